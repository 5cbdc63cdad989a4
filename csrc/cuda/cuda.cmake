# SPDX-License-Identifier: BSD-3-Clause
# _ops_cuda.so, where nvcc is found. Sets DCD_CUDA_BUILT (the targets in words) or DCD_CUDA_LEFT_OUT (the reason).
set(DCD_CUDA_BUILT "")
set(DCD_CUDA_LEFT_OUT "")

if(DCD_CUDA STREQUAL "OFF")
  set(DCD_CUDA_LEFT_OUT "DCD_CUDA=OFF")
elseif(DCD_SANITIZE AND NOT DCD_CUDA STREQUAL "ON")
  set(DCD_CUDA_LEFT_OUT "a sanitizer's build")
else()
  # nothing is compiled for "the GPU here": flags below name the targets
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      set(DCD_CUDA_LEFT_OUT "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
    endif()
  else()
    set(DCD_CUDA_LEFT_OUT "no working nvcc was found")
  endif()
endif()

if(DCD_CUDA_LEFT_OUT)
  if(DCD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DCD_CUDA=ON, but ${DCD_CUDA_LEFT_OUT}")
  endif()
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
# compute_80 as PTX serves every later device that has no machine code here
set(DCD_CUDA_BUILT "sm_80 sm_90a and PTX of compute_80")
set(DCD_CUDA_CODE "SHELL:-gencode=arch=compute_80,code=[sm_80,compute_80]" "SHELL:-gencode=arch=compute_90a,code=sm_90a")

add_library(_ops_cuda MODULE
  csrc/tensors.cpp
  csrc/cuda/ops_cuda_branch.cpp
  csrc/cuda/ops_cuda_depthwise.cpp
  csrc/cuda/branch.cu
  csrc/cuda/device.cu
  csrc/cuda/pool.cu
  csrc/cuda/depthwise_convolve_bfloat.cu
  csrc/cuda/depthwise_convolve_float.cu
  csrc/cuda/depthwise_convolve_half.cu
  csrc/cuda/depthwise_reduce.cu
  csrc/cuda/depthwise_sums_bfloat.cu
  csrc/cuda/depthwise_sums_float.cu
  csrc/cuda/depthwise_sums_half.cu)
target_compile_definitions(_ops_cuda PRIVATE TORCH_TARGET_VERSION=0x020b000000000000 DCD_CUDA_LIBRARY USE_CUDA)
target_include_directories(_ops_cuda SYSTEM PRIVATE
  ${DCD_TORCH_ROOT}/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(_ops_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${DCD_WERROR}>:-Werror>
    -ffile-prefix-map=${CMAKE_SOURCE_DIR}/= -ffile-prefix-map=${DCD_TORCH_ROOT}/=torch/>
  "$<$<COMPILE_LANGUAGE:CUDA>:${DCD_CUDA_CODE};-Xcompiler=-Wall,-Wextra;$<$<BOOL:${DCD_WERROR}>:-Werror=all-warnings;-Xcompiler=-Werror>>")
set_target_properties(_ops_cuda PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON
  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)

# The library's symbols come from torch; loading it must bring in libtorch_cuda.so, for nothing else names it. A CPU
# torch has none: an empty library of that name stands in for it while linking.
target_link_directories(_ops_cuda PRIVATE ${DCD_TORCH_ROOT}/lib)
if(EXISTS ${DCD_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(DCD_TORCH_CUDA torch_cuda)
else()
  file(WRITE ${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp "")
  add_library(torch_cuda_stub SHARED ${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp)
  set_target_properties(torch_cuda_stub PROPERTIES
    OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stub)
  set(DCD_TORCH_CUDA torch_cuda_stub)
endif()
target_link_libraries(_ops_cuda PRIVATE torch_cpu -Wl,--no-as-needed ${DCD_TORCH_CUDA} -Wl,--as-needed)
list(APPEND DCD_OPS_TARGETS _ops_cuda)
