"""A network, rows of sequences, and files of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from networks import make_cell

from cellstack import Network
from cellstack.nodes import Dense, Recurrent

FEATURES = ("load", "heat", "wind")
COLUMNS = {"id": "meter", "time": "hour", "features": FEATURES}


def make_net(seed=0, units=6, outputs=2):
    rng = np.random.default_rng(seed)
    cells = (make_cell(rng, 3, units), make_cell(rng, units, units, peepholes=True))
    head = Dense(rng.normal(size=(units, outputs)).astype("f4"), None, "linear")
    return Network([Recurrent(cells), head])


def make_rows(seed=0, lengths=(5, 1, 9, 4), first=0, names="meter-{}"):
    """Return rows of sequences in the order of time, and the sequences as arrays by id."""
    rng = np.random.default_rng(seed)
    whole = {names.format(n): rng.normal(size=(length, 3)).astype("f4") for n, length in enumerate(lengths)}
    rows = [(name, first + hour, *x) for name, steps in whole.items() for hour, x in enumerate(steps.tolist())]
    rows.sort(key=lambda row: row[1])
    arrays = list(zip(*rows, strict=True))
    columns = {"meter": arrays[0], "hour": np.array(arrays[1])}
    columns |= {name: np.array(values, "f4") for name, values in zip(FEATURES, arrays[2:], strict=True)}
    return pa.table(columns), whole


def write(path, table, rows=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def expected(net, whole):
    """Return the outputs of whole sequences by id."""
    return {name: net.run(x[None])[0][0] for name, x in whole.items()}


def outputs(table):
    """Return the predictions of scored rows by id, in the order of rows."""
    found = table.to_pandas()
    names = [name for name in found.columns if name.startswith("predicted")]
    return {name: rows[names].to_numpy() for name, rows in found.groupby("meter", sort=False)}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, y in wanted.items():
        np.testing.assert_array_equal(found[name], y)
