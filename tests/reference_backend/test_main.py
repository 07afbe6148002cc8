"""What `python -m reference_backend` says where its libraries are not installed."""

import importlib.util

from reference_backend.__main__ import main


def test_missing_libraries_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "jinja2") else object())
    assert main() == 3
    assert capsys.readouterr().err == (
        "reference_backend: torch, jinja2 not installed; try `pip install 'weir[backend]'`\n"
    )
