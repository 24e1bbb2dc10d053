#!/usr/bin/env bash
# make_llama_cpp.sh FOLDER: build llama.cpp's server and quantiser there, from the sources that a package of the Python
# index carries (llama-cpp-python), and put beside them what its converter imports. Nothing is installed outside FOLDER.
# tests/serving/test_llama_cpp.py then uses FOLDER/llama.cpp and FOLDER/python.
set -euo pipefail
VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

folder=$(mkdir -p "$1" && cd "$1" && pwd)
sources=$folder/llama.cpp
if [ -x "$sources/build/bin/llama-server" ] && [ -x "$sources/build/bin/llama-quantize" ]; then
    echo "$sources is built"
    exit 0
fi
for tool in cmake c++; do
    command -v "$tool" > /dev/null || { echo "no $tool on this machine: llama.cpp cannot be built" >&2; exit 3; }
done

python=${PYTHON:-python3}
archive=$folder/llama_cpp_python-$VERSION.tar.gz
[ -f "$archive" ] || "$python" -m pip download --quiet --no-deps --no-binary :all: \
    --dest "$folder" "llama-cpp-python==$VERSION"
echo "$SHA256  $archive" | sha256sum --check --quiet
"$python" -m pip install --quiet --no-deps --upgrade --target "$folder/python" sentencepiece
rm -rf "$sources"
mkdir "$sources"
tar -xzf "$archive" -C "$sources" --strip-components 3 "llama_cpp_python-$VERSION/vendor/llama.cpp"

# No web page, no TLS, no tests: the server and the quantiser alone.
log=$folder/build.log
build() {
    cmake -S "$sources" -B "$sources/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF &&
        cmake --build "$sources/build" --parallel "${JOBS:-2}" --target llama-server llama-quantize
}
build > "$log" 2>&1 || { tail -n 3 "$log" >&2; exit 4; }
echo "$sources is built"
