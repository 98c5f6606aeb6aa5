"""The compiled extension, where it was built."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llmkern.errors import DeviceError


def native() -> Any:
    """Return the compiled extension; raises DeviceError when it was not built."""
    try:
        import llmkern._recorder as _recorder
    except ImportError as error:
        raise DeviceError(
            f"the recorder extension llmkern._recorder is not built ({error}): run 'pip install -e .' in the checkout."
        ) from error
    return _recorder


def labels(ids: Any, names: list[str]) -> pa.DictionaryArray:
    """Return *ids* into *names* as a dictionary column."""
    return pa.DictionaryArray.from_arrays(pa.array(np.asarray(ids, np.int32)), pa.array(names, pa.string()))
