"""Tables as a terminal shows them."""

import pytest

from lfmq.commands.console import Table, print_tables

COLUMNS = ("build", "engine", *(f"figure {i}" for i in range(9)))
ROWS = tuple((f"sample-int4-{n}", "read", *["0.00234 ± 0.0001"] * 9) for n in ("mlx", "onnx"))


@pytest.mark.parametrize(("width", "turned"), [(80, True), (300, False)])
def test_a_table_that_is_too_wide_shows_its_rows_as_columns(
    width: int, turned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_tables(Table("title", COLUMNS, ROWS, turns=True), width=width)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum("0.00234" in line for line in lines) == (9 if turned else 2)
    assert any("figure 8" in line and "figure 0" in line for line in lines) is not turned
