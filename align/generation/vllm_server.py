"""Sample responses with vLLM for a run of align, in an environment of its own.

This file needs vLLM and the standard library only: vLLM's requirements exclude those of align. `rollout_engine: vllm`
with `vllm_python` starts it. For `vllm_server_base_url` start it by hand, with the same token in both environments:

    ALIGN_VLLM_TOKEN=... python -I align/generation/vllm_server.py --model FOLDER --max_model_len 600 --port 8100

Requests are JSON with the token as `Authorization: Bearer`. `GET /` describes the server. `POST /weights` loads a Hugging Face
folder of safetensors, which this machine sees under the path given, as version `version`. `POST /generate` samples a response
to each prompt of token ids with the noise of its own seed, up to and including a stop token, and refuses another version than
is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

TOKEN = "ALIGN_VLLM_TOKEN"  # the environment variable
DEFAULTS = {  # of vLLM's own variables
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, without a GPU
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Refused(Exception):
    """A request that cannot be served; the message is for the person who runs the client."""


class Sampler:
    """A vLLM engine and the version of the weights in it; 0 are those of `--model`."""

    def __init__(self, options: argparse.Namespace):
        from vllm import LLM
        from vllm.platforms import current_platform

        self.on_cpu = bool(current_platform.is_cpu())
        if self.on_cpu:  # its processes import `RepackHeads` from here, whose folder comes last: it has a file vllm.py
            sys.path.append(str(Path(__file__).parent))
        self.llm = LLM(
            model=options.model,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enforce_eager=options.enforce_eager,
            trust_remote_code=options.trust_remote_code,
            worker_extension_cls=f"{Path(__file__).stem}.{RepackHeads.__name__}" if self.on_cpu else "",
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            generation_config="vllm",  # no top_k, top_p or temperature of the model's own
            seed=0,
        )
        self.version = 0
        self.description = {"model": options.model, "dtype": options.dtype, "max_model_len": options.max_model_len}

    def describe(self) -> dict[str, Any]:
        return {**self.description, "version": self.version}

    def load_weights(self, folder: str, version: int) -> dict[str, Any]:
        self.version = -1  # unknown, if what follows fails
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if self.on_cpu:
            self.llm.collective_rpc("repack_heads")
        self.llm.reset_prefix_cache()
        self.version = version
        return {"version": version}

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        temperature: float,
        max_tokens: int,
        stop_token_ids: list[int],
        version: int,
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        if version != self.version:
            raise Refused(f"this server has version {self.version} of the weights, and version {version} was asked for")
        settings = [
            SamplingParams(
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                ignore_eos=True,
                logprobs=0,  # that of the sampled token
                detokenize=False,
                seed=seed,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found = [output.outputs[0] for output in self.llm.generate(asked, settings, use_tqdm=False)]
        return {
            "version": self.version,
            "ids": [list(one.token_ids) for one in found],
            "logprobs": [
                [each[token].logprob for each, token in zip(one.logprobs, one.token_ids, strict=True)] for one in found
            ],
        }


class RepackHeads:
    """A method of vLLM's workers, which each have a part of the model."""

    get_model: Any

    def repack_heads(self) -> None:
        """Repack the weights of language-model heads for the CPU's kernels.

        A head that is tied to the embeddings is not among the weights that are loaded, and so keeps its packed copy of the old
        ones (vLLM 0.32).
        """
        for module in self.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)


class Handler(BaseHTTPRequestHandler):
    """One request at a time: vLLM batches the prompts of a request itself."""

    sampler: Sampler
    token: str

    def do_GET(self) -> None:
        self._answer(lambda _: self.sampler.describe())

    def do_POST(self) -> None:
        actions: dict[str, Any] = {"/weights": self.sampler.load_weights, "/generate": self.sampler.generate}
        if (action := actions.get(self.path)) is None:
            self._send(404, {"error": f"no such path: {self.path}"})
        else:
            self._answer(lambda keys: action(**keys))

    def _answer(self, action: Any) -> None:
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            self._send(401, {"error": f"the token is not that of this server; set {TOKEN} to the same text for both"})
            return
        try:
            keys = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
            self._send(200, action(keys))
        except Refused as error:
            self._send(409, {"error": str(error)})
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of the model to start with")
    parser.add_argument("--max_model_len", type=int, required=True, help="tokens of a prompt with its response at most")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--max_num_seqs", type=int, default=256, help="responses at once")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9)
    parser.add_argument(
        "--enforce_eager", action="store_true", help="no CUDA graphs: starts sooner, decodes more slowly"
    )
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--ready_file", help="file that gets the URL once the server answers")
    parser.add_argument("--exit_with_stdin", action="store_true", help="end once standard input is closed")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not (token := os.environ.get(TOKEN)):
        sys.exit(f"vllm_server: set {TOKEN} to a secret text, the same for the run")
    if options.exit_with_stdin:  # the run that started this server has ended, however it ended
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if options.tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    Handler.token, Handler.sampler = token, Sampler(options)
    server = HTTPServer((options.host, options.port), Handler)
    host, port = server.server_address[:2]
    url = f"http://{host!s}:{port}"
    if options.ready_file:
        partial = Path(f"{options.ready_file}.partial")
        partial.write_text(url)
        partial.replace(options.ready_file)
    print(f"vllm_server: {url} samples from {options.model}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
