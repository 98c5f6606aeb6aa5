"""What is recorded twice does not count twice."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.errors import RunFolderError
from llmkern.runfolder import RunFolder
from tests.synthetic import synthetic_run
from tests.tables import sign


@pytest.mark.parametrize("category", ["window", "generate", "phase"])
def test_a_window_generation_or_phase_that_is_there_twice_is_named(tmp_path: Path, category: str) -> None:
    """A window twice was a traceback; a generation twice a lower figure, and nobody knew."""
    run, _ = synthetic_run(tmp_path / "run")
    table = pq.read_table(run.path / "ranges.parquet")
    row = table["category"].to_pylist().index(category)
    pq.write_table(pa.concat_tables([table, table.slice(row, 1)]), run.path / "ranges.parquet")
    sign(run.path, "ranges")
    with pytest.raises(RunFolderError, match=rf"has {category} .* twice: the file was changed"):
        attribute(RunFolder(run.path))
