"""The quickstart notebook runs from top to bottom in a kernel of its own, whose event loop is running."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def read() -> Any:
    """Return the notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(cell: Any) -> str:
    """Return what a cell prints and the text of its last expression."""
    parts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    parts += [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return "".join(parts)


def test_is_stored_without_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
# What Jupyter's client itself does when it starts and ends a kernel is not this package's.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_runs() -> None:
    notebook = read()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    search = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    # Without this suite's flags, XLA compiles as it does for those who run the notebook.
    client.execute(env={**os.environ, "PYTHONPATH": search, "XLA_FLAGS": ""})
    texts = {cell.source.splitlines()[-1]: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert texts["answer.outputs[0].text"] == "'The capital of France is Paris.'"
    assert texts['    print(pieces[-1], end="", flush=True)'] == "The capital of France is Paris."
    assert "log-probability of the prompt: -" in "".join(texts.values())
    itself, paraphrase, other = map(float, re.findall(r"-?\d\.\d*", texts["similarity.round(3)"])[:3])
    assert itself == pytest.approx(1, abs=1e-3) and paraphrase > other
