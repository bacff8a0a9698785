#!/usr/bin/env bash
# All GPU checks in one call, on a machine with an NVIDIA GPU, nvcc, cmake, TensorRT (Python package and library) and its
# headers: builds the libraries, runs the kernel test, the sanitizers, every test marked `gpu`, and prints a short table last.
#   usage: tests/gpu.sh [OUT] [pytest arguments]      OUT: folder for logs and rows.jsonl (default build/gpu)
#   TENSORRT_INCLUDE_DIR: TensorRT's headers.  STM_GPU_PARTS: which parts to run (default "kernels sanitizers engines")
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd); shift || true
parts=${STM_GPU_PARTS:-kernels sanitizers engines}
include=${TENSORRT_INCLUDE_DIR:?set TENSORRT_INCLUDE_DIR to the folder of NvInfer.h}
status=0
note() { printf '%-28s %s\n' "$1" "$2" | tee -a "$out/summary.txt"; }
step() { # step NAME COMMAND...: run, log, note
  local name=$1 start=$SECONDS; shift
  if "$@" > "$out/$name.log" 2>&1; then note "$name" "ok (${SECONDS} s, took $((SECONDS - start)) s)"
  else note "$name" "FAILED (exit $?), see $name.log"; tail -30 "$out/$name.log"; status=1; fi
}
: > "$out/summary.txt"; rm -f "$out/rows.jsonl"
note gpu "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
build() {
  cmake -S . -B build/gpu-libs -G Ninja -DCMAKE_BUILD_TYPE=Release -DSTM_CUDA_ARCHITECTURES="${STM_CUDA_ARCHITECTURES:-90-real}" \
    -DTensorRT_INCLUDE_DIR="$include" -DSTM_BUILD_TESTS=ON && cmake --build build/gpu-libs
}
step build build
core=$(find "$PWD/build/gpu-libs" -name 'libstm_trt*.so' ! -name '*_static*' | head -1)
export STM_PLUGIN_LIBRARY=$core STM_GPU=1 STM_GPU_OUT=$out STM_GPU_BUILD=$PWD/build/gpu-libs
kernel_test=$(find "$PWD/build/gpu-libs" -name stm_kernel_test -type f | head -1)
case " $parts " in *" kernels "*)
  step kernels "$kernel_test"
  step kernel-times "$kernel_test" --time ;;
esac
case " $parts " in *" sanitizers "*)
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$kernel_test" --quick
  done ;;
esac
case " $parts " in *" engines "*)
  step export python3 -m exporter export --model vim-t --weights random --rate 0.2 --batch 1:8:64 -o "$out/sample/vim.engine"
  export STM_GPU_ENGINE=$out/sample/vim.engine STM_GPU_REFERENCE=$out/sample/vim.reference
  step doctor python3 -m exporter doctor --require-gpu
  step engines python3 -m pytest tests/gpu tests/samples -m gpu -q -p no:cacheprovider "$@"
  tail -3 "$out/engines.log" ;;
esac
python3 tests/gpu_table.py "$out" || status=1
cat "$out/summary.txt"
exit $status
