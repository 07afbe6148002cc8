"""What pyproject.toml cannot say: that the data path may be compiled.

With WEIR_COMPILE=1, mypyc (https://mypyc.readthedocs.io) turns the files below, as they are, into one C extension:
those that run for each request. Everything else, and everything without it, is Python as written. `make compiled` does
it.
"""

import os

from setuptools import Extension, setup

COMPILED = """
    gateway/admission.py gateway/allowance.py gateway/answer.py gateway/attempts.py gateway/body.py
    gateway/call.py gateway/client.py gateway/rpc/client.py gateway/head.py gateway/headers.py
    gateway/identify.py gateway/limit_headers.py gateway/local_answers.py gateway/meter.py gateway/outbox.py
    gateway/pipeline.py gateway/relay.py gateway/rescue.py gateway/resource.py gateway/server.py gateway/sse.py
    gateway/trail.py gateway/wakeup.py gateway/upstream/connection.py gateway/upstream/endpoint.py
    gateway/upstream/fleet.py gateway/upstream/pool.py observability/access_log.py observability/fanout.py
    observability/line_writer.py observability/metrics.py observability/millis.py observability/recent.py
    observability/request.py observability/tail_sampling.py policies/access.py policies/balance.py
    policies/breaker.py policies/bucket.py policies/deadline.py policies/errors.py policies/lease.py
    policies/prefix.py policies/quota.py policies/retry.py policies/routing.py policies/window.py
""".split()  # noqa: SIM905  a list of names that is read and edited as text


def extensions() -> list[Extension]:
    if os.environ.get("WEIR_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415  only who compiles has it

    return mypycify(["--config-file=pyproject.toml", *COMPILED], opt_level="3", debug_level="0")


setup(ext_modules=extensions())
