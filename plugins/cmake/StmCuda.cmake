# Finds and enables the CUDA compiler: CMAKE_CUDA_COMPILER, CUDACXX, nvcc on the PATH, /usr/local/cuda, or pip's nvcc in the
# active Python environment. Takes headers and the static runtime from beside it: FindCUDAToolkit refuses pip's layout,
# which has no libcudart.so. Defines stm_cudart and STM_CUDA_INCLUDE_DIRS.
set(CMAKE_CUDA_ARCHITECTURES ${STM_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  file(GLOB pip_bin "$ENV{VIRTUAL_ENV}/lib/python3*/site-packages/nvidia/cu1*/bin")
  find_program(STM_NVCC nvcc PATHS /usr/local/cuda/bin ${pip_bin} DOC "CUDA compiler")
  if(NOT STM_NVCC)
    message(FATAL_ERROR "No CUDA compiler: nvcc is neither on the PATH nor in /usr/local/cuda. Install the CUDA toolkit (12.8 or "
      "later), or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-runtime`, and pass "
      "-DCMAKE_CUDA_COMPILER=/path/to/nvcc (with pip: <site-packages>/nvidia/cu13/bin/nvcc).")
  endif()
  set(CMAKE_CUDA_COMPILER ${STM_NVCC})
endif()
enable_language(CUDA)

if("${STM_CUDA_ARCHITECTURES}" MATCHES "(100|120)" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "STM_CUDA_ARCHITECTURES is '${STM_CUDA_ARCHITECTURES}', but CUDA ${CMAKE_CUDA_COMPILER_VERSION} knows no Blackwell "
    "(sm_100, sm_120). Use CUDA 12.8 or later, or -DSTM_CUDA_ARCHITECTURES=\"80-real;86-real;89-real;90\".")
endif()

get_filename_component(stm_nvcc "${CMAKE_CUDA_COMPILER}" REALPATH)
get_filename_component(stm_cuda_root "${stm_nvcc}" DIRECTORY)
get_filename_component(stm_cuda_root "${stm_cuda_root}" DIRECTORY)
find_path(STM_CUDA_INCLUDE_DIRS cuda_runtime_api.h
  HINTS ${stm_cuda_root} PATHS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} PATH_SUFFIXES include targets/x86_64-linux/include
  targets/sbsa-linux/include)
find_library(STM_CUDART_STATIC cudart_static
  HINTS ${stm_cuda_root} PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib
  targets/sbsa-linux/lib)
foreach(found STM_CUDA_INCLUDE_DIRS STM_CUDART_STATIC)
  if(NOT ${found})
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} has no CUDA runtime beside it (looked below ${stm_cuda_root} for cuda_runtime_api.h and "
      "libcudart_static.a). Install it (with pip: nvidia-cuda-runtime) or set -D${found}=.")
  endif()
endforeach()
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${STM_CUDA_ARCHITECTURES}: ${CMAKE_CUDA_COMPILER}")

find_package(Threads REQUIRED)
add_library(stm_cudart INTERFACE)
target_link_libraries(stm_cudart INTERFACE ${STM_CUDART_STATIC} ${CMAKE_DL_LIBS} Threads::Threads rt)
