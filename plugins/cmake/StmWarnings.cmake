# Warnings are errors. TensorRT's and CUDA's own headers are SYSTEM, so only our code is judged.
add_library(stm_warnings INTERFACE)
set(stm_host_warnings -Wall -Wextra -Werror)
list(JOIN stm_host_warnings "," stm_host_list)
target_compile_options(stm_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:${stm_host_warnings}>
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcompiler=${stm_host_list} -Werror=all-warnings>")
