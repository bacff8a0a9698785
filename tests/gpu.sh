#!/usr/bin/env bash
# All GPU checks in one call, on a machine with an NVIDIA GPU, nvcc, cmake, ninja, compute-sanitizer, pytest, TensorRT (Python package and
# library) and its headers: builds the libraries, runs the kernel test, the sanitizers, every test marked `gpu`, and prints short tables last.
#   usage: tests/gpu.sh [OUT]        OUT: folder for logs and rows.jsonl (default build/gpu)
#   TENSORRT_INCLUDE_DIR: TensorRT's headers.  STM_GPU_PARTS: what to run (default "engines sanitizers accuracy soak latency
#   reductions bench kernels trtexec"; STM_GPU_REDUCTIONS: which methods).  STM_GPU_SOAK_SECONDS: how long the soaks last (default 60)
#   STM_TRTEXEC: NVIDIA's trtexec, where it is not on the PATH
# Parity, build and reduction tests, sanitizers, the kernel test and trtexec run in some twenty processes at once, spread over all GPUs (or those
# of CUDA_VISIBLE_DEVICES); what is timed runs alone on the first one, after them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
parts=" ${STM_GPU_PARTS:-engines sanitizers accuracy soak latency reductions bench kernels trtexec} "
include=${TENSORRT_INCLUDE_DIR:?set TENSORRT_INCLUDE_DIR to the folder of NvInfer.h}
: > "$out/summary.txt"; rm -rf "$out/rows.jsonl" "$out/failed" "$out/portables" "$out/trtexec.log"
note() { printf '%-20s %s\n' "$1" "$2" | tee -a "$out/summary.txt"; }
step() { # step NAME COMMAND...: run, log, note
  local name=$1 start=$SECONDS code=0; shift
  "$@" > "$out/$name.log" 2>&1 || code=$?
  if [ $code = 0 ]; then note "$name" "ok, $((SECONDS - start)) s"
  else note "$name" "FAILED (exit $code), see $name.log"; touch "$out/failed"; fi
}
IFS=, read -ra cards <<< "${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
started=0
spread() { # spread COMMAND...: in the background, on the next GPU
  local card=${cards[started++ % ${#cards[@]}]}
  CUDA_VISIBLE_DEVICES=$card "$@" &
}
gpu_tests() { python3 -m pytest -m gpu -q -p no:cacheprovider --durations=5 "$@"; }
note gpu "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
build() {
  cmake -S . -B build/gpu-libs -G Ninja -DCMAKE_BUILD_TYPE=Release -DSTM_CUDA_ARCHITECTURES="${STM_CUDA_ARCHITECTURES:-90-real}" \
    -DTensorRT_INCLUDE_DIR="$include" -DSTM_BUILD_TESTS=ON && cmake --build build/gpu-libs
}
step build build
libraries=$PWD/build/gpu-libs
core=$(find "$libraries" -name 'libstm_trt*.so' ! -name '*_static*' | head -1)
kernel_test=$(find "$libraries" -name stm_kernel_test -type f | head -1)
export STM_PLUGIN_LIBRARY=$core STM_GPU=1 STM_GPU_OUT=$out STM_GPU_BUILD=$libraries
export STM_GPU_PORTABLES=$out/portables  # exported once for all processes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of each of them
export STM_GPU_ENGINE=$out/sample/vim.engine STM_GPU_REFERENCE=$out/sample/vim.reference
samples() {
  step export python3 -m exporter export --model vim-t --weights random --rate 0.2 --batch 1:8:64 --opt-level 1 -o "$STM_GPU_ENGINE"
  step samples gpu_tests tests/samples
  STM_GPU_MODELS=vim-t STM_GPU_RATES=0.2 step engine-build gpu_tests tests/gpu/test_engine_build.py
}
engine_memcheck() { # the kernels in an engine, on the memory that TensorRT gives them
  step sanitized-export python3 -m exporter export --model vim-t --weights random --batch 1:64:128 --opt-level 1 --no-verify -o "$out/sanitized.engine"
  step engine-memcheck compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m exporter bench "$out/sanitized.engine" --launch both --rounds 3 --round-ms 1
}
run_trtexec() { # run_trtexec TRTEXEC: builds and runs a lowered model through both ways of loading the plugin
  local portable=$out/trtexec.onnx shapes way library
  python3 -m exporter export --model vim-t --weights random --rate 0.2 --no-verify -o "$portable" &&
  python3 -c 'import onnx, sys; from exporter.passes.tensorrt import lower_tensorrt; onnx.save(lower_tensorrt(onnx.load(sys.argv[1]), "fp16"), sys.argv[2])' \
    "$portable" "$out/lowered.onnx" || return
  for way in static dynamic; do
    library=$([ $way = static ] && echo "${core%.so}_static.so" || echo "$core")
    for shapes in "--onnx=$out/lowered.onnx --stronglyTyped --minShapes=images:1x3x224x224 --optShapes=images:8x3x224x224 --maxShapes=images:8x3x224x224 --builderOptimizationLevel=1 --skipInference --saveEngine=$out/$way.plan" \
                  "--loadEngine=$out/$way.plan --shapes=images:8x3x224x224 --useCudaGraph --iterations=50"; do
      echo "+ trtexec --${way}Plugins=$(basename "$library") $shapes"
      "$1" "--${way}Plugins=$library" $shapes || return  # unquoted: a list of options
    done
  done
}
parity() { # parity MODEL RATE
  local also=""
  [ "$2" = 0.2 ] && also=" or 512"  # the agreement on 512 images is of one rate: elsewhere pytest would skip it
  STM_GPU_MODELS=$1 STM_GPU_RATES=$2 step "parity-$1-$2" gpu_tests tests/gpu/test_engine_parity.py -k "test_parity$also"
}
case "$parts" in *" engines "*)
  step doctor python3 -m exporter doctor --require-gpu
  for model in vim-b vim-s vim-t; do for rate in 0.2 0.4 0.0; do spread parity "$model" "$rate"; done; done
  spread samples ;;
esac
case "$parts" in *" sanitizers "*)
  for tool in memcheck racecheck initcheck synccheck; do
    spread step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$kernel_test" --quick
  done
  spread engine_memcheck ;;
esac
case "$parts" in *" reductions "*)
  read -ra methods <<< "${STM_GPU_REDUCTIONS:-}"
  processes=${#methods[@]}  # one a method, at most four
  ((processes >= 1 && processes <= 4)) || processes=4
  for ((part = 0; part < processes; part++)); do
    STM_GPU_REDUCTIONS_PART=$part/$processes spread step "reductions-$part" gpu_tests tests/gpu/test_reductions.py
  done ;;
esac
case "$parts" in *" accuracy "*) spread step accuracy gpu_tests tests/gpu/test_scan_accuracy.py ;; esac
case "$parts" in *" kernels "*) spread step kernels "$kernel_test" ;; esac
case "$parts" in *" trtexec "*)
  if trtexec=$(command -v "${STM_TRTEXEC:-trtexec}"); then spread step trtexec run_trtexec "$trtexec"
  else note trtexec "not on this machine: set STM_TRTEXEC to try the plugin with it"; fi ;;
esac
wait
export CUDA_VISIBLE_DEVICES=${cards[0]}
[ ! -e "$out/trtexec.log" ] || grep -hE "Throughput:|GPU Compute Time: min" "$out/trtexec.log" | sed 's/^\[[^]]*\] \[I\] /  /' | tee -a "$out/summary.txt"
case "$parts" in *" kernels "*) step kernel-times "$kernel_test" --time ;; esac
case "$parts" in *" latency "*) step latency gpu_tests tests/gpu/test_latency.py ;; esac
case "$parts" in *" soak "*)
  STM_GPU_MODELS=vim-t STM_GPU_RATES=0.2 step soak gpu_tests tests/gpu/test_soak.py
  step kernel-soak "$kernel_test" --soak "${STM_GPU_SOAK_SECONDS:-60}" ;;
esac
case "$parts" in *" bench "*) step bench gpu_tests tests/gpu/test_bench.py ;; esac
python3 tests/gpu_table.py "$out" || touch "$out/failed"
cat "$out/summary.txt"
[ ! -e "$out/failed" ]
