#!/usr/bin/env bash
# Writes the locks of the container image into requirements/: every package with its version and hashes.
#
#   tools/lock.sh                      all of them; needs uv and the package index
#   CPU_TORCH="--find-links DIR" tools/lock.sh     where PyTorch's own index cannot be reached: its CPU wheel lies in DIR
#
# constraints.txt says which versions; a lock adds what torch pins itself (CUDA's libraries) and the hashes.
# For Python 3.11 on x86-64, the Python of the image's base.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CPU_TORCH="${CPU_TORCH:---torch-backend cpu}"
scratch="$(mktemp -d)"
trap 'rm -rf "${scratch}"' EXIT

# compile LOCK FLAGS... < REQUIREMENTS
compile() {
    local lock="requirements/$1.txt"
    shift
    {
        echo "# Written by tools/lock.sh from pyproject.toml and constraints.txt; pip install --no-deps --require-hashes --only-binary :all:"
        uv pip compile - "$@" --quiet --no-header --no-annotate --generate-hashes --only-binary :all: \
            --python-version 3.11 --python-platform x86_64-manylinux_2_28
    } > "${scratch}/lock"
    cp "${scratch}/lock" "${lock}"
    echo "${lock}: $(grep --count '==' "${lock}") packages"
}

# requirements EXPRESSION: that part of pyproject.toml, one requirement a line
requirements() {
    python3 -c "import pathlib, tomllib; project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())
print(*$1, sep='\n')"
}

# litdata asks for torchvision but needs it for images only. Without a GPU no Triton kernel runs: 0.7 GB less.
echo torchvision > "${scratch}/excluded"
echo triton | cat "${scratch}/excluded" - > "${scratch}/excluded-cpu"
# Of two builds of a version pip takes the one with a label, +cpu; the label is what keeps CUDA's out.
sed 's/^torch==.*/&+cpu/' constraints.txt > "${scratch}/constraints-cpu"

mkdir -p requirements
dependencies="$(requirements "project['project']['dependencies']")"
# shellcheck disable=SC2086
compile cpu --constraint "${scratch}/constraints-cpu" --excludes "${scratch}/excluded-cpu" ${CPU_TORCH} <<< "${dependencies}"
compile cu130 --constraint constraints.txt --excludes "${scratch}/excluded" <<< "${dependencies}"
for extra in hf pypi tables; do
    compile "${extra}" --constraint constraints.txt <<< "$(requirements "project['project']['optional-dependencies']['${extra}']")"
done
compile build --constraint constraints.txt <<< "$(requirements "project['build-system']['requires']")"
