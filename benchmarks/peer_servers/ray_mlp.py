"""Ray Serve with the small network, batches of up to 64, one replica behind its HTTP proxy. PORT MODEL.onnx FOLDER"""

import signal
import sys

import numpy as np
import onnxruntime
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=256)
class Mlp:
    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def predict(self, rows):
        return list(self.session.run(None, {"x": np.stack(rows)})[0])

    async def __call__(self, request: Request):
        asked = await request.json()
        output = await self.predict(np.asarray(asked["inputs"][0]["data"], np.float32))
        return {"outputs": [{"name": "y", "shape": [1, 10], "datatype": "FP32", "data": output.tolist()}]}


if __name__ == "__main__":
    ray.init(include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[3], log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Mlp.bind(sys.argv[2]), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()
