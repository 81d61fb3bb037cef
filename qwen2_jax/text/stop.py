"""Finds stop strings in a text that arrives token by token, and holds back what may become one."""

from collections.abc import Sequence


class StopChecker:
    """Decides what of one output may be shown, and when a stop string ends it.

    The stop string that is complete first wins; of several that end at the same character, the longest. This depends on
    the text alone, not on how tokens split it. A stop string whose last character belongs to one of the first
    `min_tokens` tokens is ordinary text.

    Args:
        stop: the stop strings; none means that all text passes through.
        include_stop_str_in_output: whether the text ends after the stop string rather than before it. Nothing needs
            to be held back then.
        min_tokens: number of tokens that cannot complete a stop string.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False, min_tokens: int = 0) -> None:
        # Longest first, so that the first automaton to match is the one that wins.
        self._matchers = [_Matcher(pattern) for pattern in sorted(stop, key=len, reverse=True)]
        self._include_stop = include_stop_str_in_output
        self._tokens_left = min_tokens
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the output, or None."""

    def feed(self, text: str) -> str:
        """Take the text of one more token (it may be empty) and return what may be shown now.

        After a match, the text ends there and `matched` is set; no more text may come.
        """
        enabled = self._tokens_left <= 0
        self._tokens_left -= 1
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            matched = [matcher.pattern for matcher in self._matchers if matcher.advance(character)]
            if matched and enabled:
                self.matched = matched[0]
                return self._release(end if self._include_stop else end - len(matched[0]), final=True)
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> str:
        """Return the text that was held back; for an output that ends without a stop string."""
        return self._release(len(self._held), final=True)

    def _num_undecided(self) -> int:
        if self._include_stop:
            return 0
        return max((matcher.length for matcher in self._matchers), default=0)

    def _release(self, count: int, *, final: bool = False) -> str:
        released, rest = self._held[:count], self._held[count:]
        self._held = "" if final else rest
        return released


class _Matcher:
    """Knuth-Morris-Pratt automaton: `length` is how much of the pattern the text so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.length = 0
        self._fallback = [0] * (len(pattern) + 1)
        border = 0
        for i in range(1, len(pattern)):
            while border and pattern[i] != pattern[border]:
                border = self._fallback[border]
            border += pattern[i] == pattern[border]
            self._fallback[i + 1] = border

    def advance(self, character: str) -> bool:
        """Take one character; return whether the pattern ends with it."""
        while self.length and character != self.pattern[self.length]:
            self.length = self._fallback[self.length]
        self.length += character == self.pattern[self.length]
        if self.length < len(self.pattern):
            return False
        self.length = self._fallback[self.length]
        return True
