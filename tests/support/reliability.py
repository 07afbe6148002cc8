"""The tables of docs/reliability.md, for tests that hold it to what they have seen."""

from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()


def rows_of(title: str) -> list[list[str]]:
    """The cells of the first table below the line `**title**`, without its head."""
    lines = iter(TEXT.split(f"\n**{title}**", 1)[1].splitlines()[1:])
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return table[2:]
