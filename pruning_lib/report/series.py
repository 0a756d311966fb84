"""Few series on a figure: criteria of one kind under one name, because nobody can tell more than six lines apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MOST = 6
GROUPS = {"one metric alone": ("cka", "gaussian_0", "gaussian_1", "gaussian_2", "linear_shape_0", "linear_shape_1",
                               "permutation", "wasserstein"), "other rankings": ("loss", "block_influence")}


def few_series(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose column ``criterion`` has groups under one name, until at most six names are left.

    The name of a group states how many criteria it holds.  A table of six criteria or fewer stays as it is.
    """
    for group, members in GROUPS.items():
        inside = table.criterion.isin(members)
        alike = table.criterion[inside].nunique()
        if table.criterion.nunique() > MOST and alike > 1:
            table = table.assign(criterion=table.criterion.mask(inside, f"{group} ({alike})"))
    return table
