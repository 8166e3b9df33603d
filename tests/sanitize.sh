#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on the parity cases.
#   tests/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "$1")
[[ $python == /* ]] || python=$PWD/$python
shift
compiler=${CXX:-g++}
here=build/sanitize

# A checkout of its own, so that the usual build stays as it is.
mkdir -p "$here"
for part in setup.py pyproject.toml README.md LICENSE csrc fusedtricks triton_kernels tests; do
  rm -rf "${here:?}/$part"
  cp -rp "$part" "$here/$part"
done
rm -rf "$here"/fusedtricks/*.so "$here"/fusedtricks/triton_kernels
ln -s ../triton_kernels "$here/fusedtricks/triton_kernels"
cd "$here"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
FUSEDTRICKS_CUDA=0 CXX=$compiler CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py build_ext --inplace

# Python itself is not built with the sanitizer: its runtime has to come first, and Python's own leaks are not ours.
# libstdc++ as well, or exceptions thrown through torch are not intercepted.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
"$python" -c "import fusedtricks._C as c, os; assert c.__file__.startswith(os.getcwd()), c.__file__"
spread=$("$python" -c "import xdist" 2>/dev/null && echo "-n auto" || true)
# shellcheck disable=SC2086
exec "$python" -m pytest tests/test_parity.py -k "not reference" -p no:cacheprovider --device cpu $spread "$@"
