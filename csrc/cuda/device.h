// SPDX-License-Identifier: BSD-3-Clause
// The CUDA runtime inside this library: it is linked statically, so it has a current device of its own.
#pragma once

namespace dcd::cuda {

// Makes a device the current one of this library's runtime; an error code, 0 for success.
int use_device(int index);
const char* error_text(int code);

}  // namespace dcd::cuda
