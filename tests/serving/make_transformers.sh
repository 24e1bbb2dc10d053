#!/usr/bin/env bash
# make_transformers.sh FOLDER: what transformers' own server imports beside transformers itself, from the Python index.
# tests/serving/test_transformers.py then puts FOLDER/python on the path of the product's own environment.
set -euo pipefail
folder=$1/python
[ -d "$folder/fastapi" ] && [ -d "$folder/uvicorn" ] && [ -d "$folder/openai" ] && exit 0
"${PYTHON:-python3}" -m pip install --quiet --upgrade --target "$folder" "fastapi<1" "uvicorn<1" openai || exit 3
echo "$folder is there"
