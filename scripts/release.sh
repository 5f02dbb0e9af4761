#!/usr/bin/env bash
# Makes a release of this commit: scripts/release.sh vX.Y.Z. RELEASE.md says how to prepare one, and how it is checked.
# It refuses before it builds anything, and tags only what passed everything.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "release: $*" >&2; exit 1; }

tag=${1:-}
[[ $tag =~ ^v[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?$ ]] || refuse "call it as scripts/release.sh vX.Y.Z"
version=${tag#v}
[[ -z $(git status --porcelain) ]] || refuse "the working tree has changes; commit them or take them out"
! git rev-parse --quiet --verify "refs/tags/$tag" >/dev/null || refuse "$tag exists"
grep -qxF "__version__ = \"$version\"" src/gateway/__init__.py ||
    refuse "src/gateway/__init__.py has another version than $version"
# The entry is a heading with the version and its day, with something under it.
entry=$(awk -v want="## $version - " 'index($0, want) == 1 { on = 1; print; next } /^## / { on = 0 } on' CHANGELOG.md)
[[ $entry =~ ^"## $version - "[0-9]{4}-[0-9]{2}-[0-9]{2} ]] ||
    refuse "CHANGELOG.md has no entry \"## $version - YYYY-MM-DD\""
grep -q '^- ' <<<"$entry" || refuse "the entry of $version in CHANGELOG.md is empty"
if [[ -n ${CHECK_ONLY:-} ]]; then echo "release: $tag can be made"; exit 0; fi

make --no-print-directory lint types test
rm -rf dist
make --no-print-directory wheel sbom
cp sbom.json "dist/agent-gateway-$version.sbom.json"
printf '%s\n' "$entry" >dist/NOTES.md

image=${IMAGE:-agent-gateway}:$version
if docker info --format '{{.ServerVersion}}' >/dev/null 2>&1; then
    make --no-print-directory docker-build IMAGE="$image" VERSION="$version"
    # A pushed image has a digest, and that is what is signed.
    if [[ -n ${PUSH:-} ]]; then docker push "$image"; fi
else
    echo "release: no container engine answers; there is no image" >&2
fi

(cd dist && sha256sum -- *.whl *.sbom.json >SHA256SUMS)
if command -v cosign >/dev/null; then
    cosign sign-blob --yes --bundle dist/SHA256SUMS.bundle dist/SHA256SUMS
    if [[ -n ${PUSH:-} ]]; then
        reference=$(docker inspect --format '{{index .RepoDigests 0}}' "$image")
        cosign sign --yes "$reference"
        cosign attest --yes --type cyclonedx --predicate sbom.json "$reference"
    fi
else
    echo "release: cosign is not installed; nothing is signed" >&2
    [[ -z ${REQUIRE_SIGNATURE:-} ]] || refuse "a signature is required"
fi

git tag --annotate "$tag" --message "$version"
echo "release: $tag is made; \`git push origin $tag\` publishes it"
