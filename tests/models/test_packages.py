"""Check that descriptions of packages are read whole, each once."""

from effcompile.models.packages import Package, parse_descriptions

LISTING = """b
second synopsis
 One line.
 .
   indented

a
first synopsis
 Other text.

a-dev
third synopsis
 Other text.

a-doc
first synopsis
 Text of its own.

empty
no long description

"""


def test_records_are_read_once():
    assert parse_descriptions(LISTING) == [
        Package("a", "first synopsis", "Other text."),
        Package("b", "second synopsis", "One line.\n\n  indented"),
    ]
