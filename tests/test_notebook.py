"""The notebook of the documentation runs from top to bottom."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "guided_decoding.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    source = "\n\n".join(cells)
    assert "STEPS = 200\n" in source
    quick = source.replace("STEPS = 200\n", "STEPS = 2\n").replace("max_new_tokens=64", "max_new_tokens=8")
    exec(compile(quick, str(NOTEBOOK), "exec"), {})
    printed = capsys.readouterr().out
    assert "plain: true reward" in printed and "guided: true reward" in printed
