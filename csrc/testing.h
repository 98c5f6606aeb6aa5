// Activity buffers built by hand in CUPTI's own layout, for tests and load generators without a GPU.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace llmkern {
void bind_testing(pybind11::module_& parent);
}
