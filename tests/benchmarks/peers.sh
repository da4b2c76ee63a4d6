#!/usr/bin/env bash
# Makes the environment of the peers in PyTorch: of noise_peers.py BackPACK, Opacus and Cockpit, of
# curvature_peers.py PyHessian.
#
#   tests/benchmarks/peers.sh FOLDER [PYTHON]    the Python that makes it must be a 3.11
#
# They need no JAX, and a setuptools of before 81. A few minutes; an environment that is complete is left
# alone. PyTorch for Linux may bring CUDA's libraries, of some gigabytes; its CPU build is enough.
set -euo pipefail

folder=${1:?the folder of the environment}
python=${2:-python3.11}
imports='import torch, backpack, opacus, cockpit, pyhessian'

if "$folder/bin/python" -W ignore -c "$imports" 2> /dev/null; then
    echo "$folder is complete"
    exit
fi
"$python" -m venv "$folder"
# Named twice: the others would bring the newest torchvision, and that another PyTorch.
"$folder/bin/pip" install torch==2.13.0
# Cockpit imports pkg_resources, which newer versions of setuptools lack.
"$folder/bin/pip" install torch==2.13.0 "setuptools<81" \
    backpack-for-pytorch==1.7.1 opacus==1.6.0 cockpit-for-pytorch==1.0.2 pyhessian==0.1
"$folder/bin/python" -W ignore -c "$imports"
