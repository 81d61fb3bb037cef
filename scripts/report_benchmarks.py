"""Make the tables and plots of the documentation from the records of docs/benchmarks.

    python scripts/report_benchmarks.py            writes them
    python scripts/report_benchmarks.py --check    exits with 1 if one of them is not what the records say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own, in docs/benchmarks.md or
kernels/README.md; what was between them is replaced. `plot: NAME` is the image of docs/benchmarks/NAME.svg. Records are
written by `kernels/bench.py --out`, `scripts/accuracy.py --out` and `scripts/gpu_check.py`; what has no record is left
out. The check compares tables, and asks of the plots only that they are there: matplotlib's versions draw differently.
"""

import argparse
import re
from pathlib import Path

from scripts.benchmark_plots import PLOTS, available, write_plots
from scripts.benchmark_tables import Read, make_tables, read_record
from scripts.yardstick import BENCHMARKS

ROOT = Path(__file__).parent.parent
DOCUMENTS = {ROOT / "docs" / "benchmarks.md": "benchmarks", ROOT / "kernels" / "README.md": "../docs/benchmarks"}
"""The documents, and how each leads to docs/benchmarks."""
MARKED = re.compile(r"<!-- (table|plot): (.*?) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def fill(text: str, read: Read, link: str) -> str:
    """Return a document with its tables and plots made anew.

    Raises:
        ValueError: a name that no table or plot has, or a marker without its end.
    """
    tables, plots = make_tables(read, link), available(read)
    images = {name: f"![{PLOTS[name]}]({link}/{name}.svg)\n" if name in plots else "" for name in PLOTS}
    known = {"table": tables, "plot": images}
    if text.count("<!-- end -->") != len(re.findall(r"<!-- (?:table|plot): ", text)):
        raise ValueError("every <!-- table: NAME --> and <!-- plot: NAME --> needs one <!-- end -->")

    def replace(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if name not in known[kind]:
            raise ValueError(f"there is no {kind} {name!r}; use one of {', '.join(known[kind])}")
        content = known[kind][name]
        return f"<!-- {kind}: {name} -->\n{content and f'\n{content}\n'}<!-- end -->\n"

    return MARKED.sub(replace, text)


def outdated(read: Read = read_record) -> list[str]:
    """Return the documents whose tables are not what the records say, and the plots that are missing."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    names = [str(path.relative_to(ROOT)) for path, text in texts.items() if fill(text, read, DOCUMENTS[path]) != text]
    missing = [name for name in available(read) if not (BENCHMARKS / f"{name}.svg").exists()]
    return names + [f"docs/benchmarks/{name}.svg" for name in missing]


def main() -> None:
    """Write the documents and the plots, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    if parser.parse_args().check:
        if names := outdated():
            raise SystemExit(f"out of date: {', '.join(names)}; run python scripts/report_benchmarks.py")
        return
    for path, link in DOCUMENTS.items():
        path.write_text(fill(path.read_text(), read_record, link))
    write_plots(read_record, BENCHMARKS)


if __name__ == "__main__":
    main()
