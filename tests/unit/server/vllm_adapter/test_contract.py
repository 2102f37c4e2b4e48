"""What the adapter relies on in vLLM, name by name: the first thing to run after an upgrade.

The modules of `vllm_adapter` import everything of vLLM that the front end uses. Here each of
those names is checked for the shape the adapter takes for granted, so that a change is a failed
line here and not a request served in the wrong pool.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import textwrap
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.generate.api_router import init_generate_state
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server, watchdog_loop
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMNotFoundError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.renderers.base import BaseRenderer
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tracing import instrument_manual
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    OutputProcessorOutput,
    RequestOutputCollector,
)
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats

from emo_serve.config import ServeSettings
from emo_serve.errors import (
    ConfigError,
    Draining,
    EmoServeError,
    EngineDead,
    LoadDeadlineExceeded,
    PoolBlocked,
    PoolConflict,
    PoolExists,
    PoolFileError,
    PoolInUse,
    PoolLoadFailed,
    PoolStoreError,
    PoolTooLarge,
    RequestError,
    StateConflict,
    TooManyQueued,
    TooManyWaiting,
    UnknownPool,
)
from emo_serve.server.asgi.errors import refusal, status_of
from emo_serve.server.startup.unsupported_flags import _UNSUPPORTED
from emo_serve.server.vllm_adapter import flags, generation, openai
from emo_serve.server.vllm_adapter.spans import RequestSpans
from emo_serve.vllm_plugin.contract import PluginSettings
from emo_serve.vllm_plugin.scheduler import TurnScheduler
from emo_serve.vllm_plugin.settings import has_front_end, read_settings
from tests.unit.vllm_plugin.test_settings import vllm_config

SITE = Path(inspect.getfile(AsyncLLM)).parents[2]


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def source(function: Any) -> str:
    return inspect.getsource(function)


# -- the generation hook --


def test_generate_and_encode_have_the_parameters_ours_replaces() -> None:
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "lora_request" in parameters(AsyncLLM.generate)
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert inspect.isasyncgenfunction(AsyncLLM.encode)
    assert not inspect.iscoroutinefunction(generation.PooledLLM.generate)
    assert not inspect.isasyncgenfunction(generation.PooledLLM.generate)


def test_generate_asks_the_engine_that_it_is_given_and_changes_nothing_of_it() -> None:
    """`request_faults` gives it another one, which says when a request has been taken."""
    body = ast.parse(textwrap.dedent(source(AsyncLLM.generate)))
    places = [node for node in ast.walk(body) if isinstance(node, ast.Attribute)]
    assert not [each.attr for each in places if isinstance(each.ctx, ast.Store)]
    assert "await self.add_request(" in source(AsyncLLM.generate)


def test_every_entry_point_generates_through_the_client_and_hands_on_the_adapter() -> None:
    """A route that called the engine in another way, or without the model's name, would slip by."""
    calls: dict[str, list[ast.Call]] = {}
    for path in (SITE / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, method = ast.unparse(node.func.value), node.func.attr
            if owner.endswith("engine_client") and method in ("generate", "encode", "add_request"):
                name = path.relative_to(SITE / "entrypoints").as_posix()
                calls.setdefault(name, []).append(node)
    generating = {
        name
        for name, nodes in calls.items()
        for node in nodes
        if ast.unparse(node.func).endswith("generate")
    }
    assert {
        "openai/chat_completion/serving.py",
        "openai/chat_completion/batch_serving.py",
        "openai/completion/serving.py",
        "openai/responses/serving.py",
        "generate/beam_search/online.py",
        "generate/label_reads.py",
        "scale_out/token_in_token_out/serving.py",
    } <= generating
    speech = {"speech_to_text/base/serving.py", "speech_to_text/realtime/connection.py"}
    for name in generating - speech:
        for node in calls[name]:
            assert "lora_request" in {keyword.arg for keyword in node.keywords}, name
    assert not any("add_request" in ast.unparse(n.func) for nodes in calls.values() for n in nodes)


def test_sampling_params_can_be_copied_and_carry_extra_args() -> None:
    written = {"emo_pool_row": 9, "emo_account": 8, "emo_mass_slot": 7, "emo_streamed": 1, "k": 1}
    params = SamplingParams(extra_args=dict(written), max_tokens=3)
    placed = generation.place_in_row(params, 2, account=5, mass_slot=4, is_streamed=True)
    ours = {"emo_pool_row": 2, "emo_account": 5, "emo_mass_slot": 4, "emo_streamed": True}
    assert placed.extra_args == {**ours, "k": 1}
    assert params.extra_args == written
    assert (placed.max_tokens, placed.output_kind) == (3, params.output_kind)
    plain = generation.place_in_row(SamplingParams(), 0)
    none = {"emo_pool_row": 0, "emo_account": 0, "emo_mass_slot": -1, "emo_streamed": False}
    assert plain.extra_args == none


def test_prompts_carry_a_cache_salt() -> None:
    assert tokens_input([1], cache_salt="s")["cache_salt"] == "s"
    prompt = tokens_input([1, 2], cache_salt="mine")
    salted = generation.salt_prompt(prompt, "0" * 64)
    assert salted == {**prompt, "cache_salt": f"emo:{'0' * 64}:mine"}
    assert generation.salt_prompt({"prompt_token_ids": [1]}, "ab")["cache_salt"] == "emo:ab:"
    with pytest.raises(VLLMValidationError):
        generation.salt_prompt("raw text", "ab")


def test_outputs_are_collected_merged_and_raised() -> None:
    assert parameters(RequestOutputCollector.__init__)[1:3] == ["output_kind", "request_id"]
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "id")
    assert collector.get_nowait() is None
    collector.put(ValueError("late"))
    with pytest.raises(ValueError, match="late"):
        collector.get_nowait()


def test_a_failed_request_shows_its_cause() -> None:
    assert "raise EngineGenerateError() from e" in source(AsyncLLM.generate)
    failed = source(Scheduler.update_from_output)
    assert "error_req_ids = set(self.grammar_compile_error_reqs)" in failed
    assert "new_token_ids=[]," in failed.partition("RequestStatus.FINISHED_ERROR\n            )")[2]


def test_the_client_has_what_the_worker_calls_need() -> None:
    assert parameters(AsyncLLM.collective_rpc)[1:4] == ["method", "timeout", "args"]
    assert isinstance(AsyncLLM.errored, property)
    assert "timeout" in parameters(AsyncLLM.shutdown)
    assert {"vllm_config", "usage_context", "enable_log_requests", "disable_log_stats"} <= set(
        parameters(AsyncLLM.from_vllm_config)
    )


def test_requests_are_counted_where_ours_are_left_out() -> None:
    handler = source(AsyncLLM._run_output_handler)
    assert "output_processor.process_outputs(" in handler
    assert "logger_ref[0].record(" in handler
    assert "iteration_stats=iteration_stats" in handler
    # every chunk of a step has the step's statistics, and no other call has any
    assert handler.count("IterationStats()") == handler.count("process_outputs(") == 1
    given = ["engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"]
    assert parameters(OutputProcessor.process_outputs) == ["self", *given]
    assert parameters(StatLoggerManager.record)[1:3] == ["scheduler_stats", "iteration_stats"]
    assert parameters(OutputProcessorOutput) == ["request_outputs", "reqs_to_abort"]
    assert parameters(IterationStats) == []
    # the id inside the engine begins with ours
    assert "{request.external_req_id}-{random_uuid()" in source(InputProcessor.assign_request_id)


# -- names of models --


def test_model_names_are_looked_up_where_ours_stands() -> None:
    assert "request.model in self.models.lora_requests" in source(BaseServing._check_model)
    adapters = source(BaseServing._maybe_get_adapters)
    assert "request.model in self.models.lora_requests" in adapters
    assert "return self.models.lora_requests[request.model]" in adapters
    # why ours lists nothing: any adapter named like a message's type would be chosen
    assert "lora_requests.values()" in source(BaseServing._get_active_default_mm_loras)


def test_the_adapters_name_is_echoed_as_model() -> None:
    assert "lora_request.lora_name" in source(OpenAIServingModels.model_name)
    adapter = LoRARequest(lora_name="math", lora_int_id=1, lora_path="x")
    assert adapter.lora_name == "math"


def test_models_are_listed_where_ours_stands() -> None:
    assert inspect.iscoroutinefunction(OpenAIServingModels.show_available_models)
    assert inspect.iscoroutinefunction(OpenAIModelRegistry.show_available_models)
    assert "self.registry = OpenAIModelRegistry" in source(OpenAIServingModels.__init__)
    card = ModelCard(id="emo")
    card.default_pool = "base"
    assert card.model_dump()["default_pool"] == "base"


# -- errors --


@pytest.mark.parametrize(
    ("error", "code", "kind", "param"),
    [
        (VLLMNotFoundError("x"), 404, "NotFoundError", None),
        (VLLMValidationError("x", parameter="model"), 400, "BadRequestError", "model"),
        (GracefulHTTPError("x", HTTPStatus.SERVICE_UNAVAILABLE), 503, "Service Unavailable", None),
        (GracefulHTTPError("x", HTTPStatus.INTERNAL_SERVER_ERROR), 500, "Internal Server", None),
    ],
)
def test_errors_have_the_statuses_the_table_counts_on(
    error: VLLMError, code: int, kind: str, param: str | None
) -> None:
    answer = create_error_response(error).error
    assert (answer.code, answer.param) == (code, param)
    assert answer.type.startswith(kind)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownPool("x"), 404),
        (PoolConflict("x"), 400),
        (PoolTooLarge("x"), 400),
        (RequestError("x"), 400),
        (PoolFileError("x"), 400),
        (PoolExists("x"), 409),
        (PoolInUse("x"), 409),
        (StateConflict("x"), 409),
        (PoolBlocked("x"), 503),
        (TooManyQueued("x"), 503),
        (TooManyWaiting("x"), 503),
        (LoadDeadlineExceeded("x"), 503),
        (PoolLoadFailed("x"), 500),
        (PoolStoreError("x"), 500),
        (Draining("x"), 503),
        (EngineDead("x"), 500),
        (EmoServeError("x"), 500),
    ],
)
def test_the_table_gives_each_of_our_errors_its_status(error: EmoServeError, status: int) -> None:
    answer = create_error_response(generation.to_http_error(error)).error
    assert answer.code == status == status_of(error)
    assert answer.message.startswith("x")


def test_our_own_refusals_look_like_vllms() -> None:
    errors = (Draining("x"), LoadDeadlineExceeded("x"), EngineDead("x"), UnknownPool("x"))
    for error in (*errors, RequestError("x"), PoolExists("x")):
        answer = create_error_response(generation.to_http_error(error, param=None))
        ours = refusal({"path": "/v1/completions"}, error)
        assert json.loads(bytes(ours.body)) == answer.model_dump()
        theirs = translate_error_response(answer)
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            ours = refusal({"path": path}, error)
            assert (ours.status_code, ours.body) == (theirs.status_code, theirs.body)


def test_our_layers_stand_where_the_router_calls_them() -> None:
    assert "self.middleware_stack(scope, receive, send)" in source(Router.__call__)
    app = FastAPI()
    called: list[str] = []

    @app.get("/x")
    async def route() -> str:
        return "x"

    inner = openai.innermost(app)

    async def layer(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["type"])
        await inner(scope, receive, send)

    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    openai.replace_innermost(app, layer)
    response = TestClient(app).get("/x", headers={"origin": "http://a"})
    assert (response.json(), called) == ("x", ["http"])
    assert response.headers["access-control-allow-origin"] == "*"


def test_only_requests_for_a_model_have_the_parameter_model() -> None:
    for param in ("model", None):
        raised = generation.to_http_error(RequestError("x"), param=param)
        assert create_error_response(raised).error.param == param


def test_metrics_are_a_route_that_answers_with_text() -> None:
    app = FastAPI()
    attach_router(app)
    (route, *_) = (route for route in app.routes if getattr(route, "path", None) == "/metrics")
    assert isinstance(route, APIRoute)
    assert not inspect.iscoroutinefunction(route.endpoint), "it is called in a thread"
    assert parameters(route.endpoint) == ["request"]


# -- start-up and serving --


def test_the_builders_take_what_they_are_given() -> None:
    assert parameters(build_app) == ["args", "supported_tasks", "model_config"]
    assert parameters(init_app_state) == ["engine_client", "state", "args", "supported_tasks"]
    assert parameters(setup_server) == ["args", "reuse_port"]
    assert parameters(watchdog_loop) == ["server", "engine"]
    assert isinstance(envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE, int)
    with NoSignalServer.capture_signals(object()):  # type: ignore[arg-type]
        pass  # leaves signals alone


def test_steps_are_counted_where_their_results_come() -> None:
    text = source(AsyncLLM._run_output_handler)
    assert "await engine_core.get_output_async()" in text
    assert parameters(OutputProcessor.has_unfinished_requests) == ["self"]
    assert parameters(AsyncMPClient.get_output_async) == ["self"]


def test_the_renderer_tokenizes_where_ours_stands() -> None:
    assert parameters(BaseRenderer._tokenize_prompt) == ["self", "prompt", "params"]
    assert parameters(BaseRenderer.render_cmpl_async)[:3] == ["self", "prompts", "tok_params"]
    text = source(BaseRenderer._tokenize_singleton_prompt_async)
    assert "await self._tokenize_prompt_async(prompt, params)" in text
    assert "await self._async_tokenizer_decode(" in source(BaseRenderer._detokenize_prompt_async)
    for name in ("_tokenize_prompt_async", "_async_tokenizer_decode", "_resources"):
        assert f"self.{name} = " in source(BaseRenderer.__init__)
    assert "await renderer.render_cmpl_async(" in source(OnlineRenderer.preprocess_cmpl)
    build = ServingGenerativeScoring._build_prompts
    assert parameters(build) == ["self", "request", "tokenizer", "max_model_len"]
    assert "state.serving_generative_scoring = " in source(init_generate_state)
    assert 0 < envs.VLLM_MAX_STOP_STRINGS < 100  # vLLM bounds these lists itself


def test_a_list_of_an_empty_key_turns_vllms_check_off() -> None:
    assert "for key in (args.api_key or [envs.VLLM_API_KEY]) if key" in source(
        init_entrypoints_middleware
    )


def test_engine_args_have_the_fields_that_are_set() -> None:
    fields = set(AsyncEngineArgs.__dataclass_fields__)
    assert {"model", "load_format", "worker_cls", "worker_extension_cls"} <= fields
    assert {"additional_config", "served_model_name", "tensor_parallel_size"} <= fields
    assert "create_model_config" in dir(AsyncEngineArgs)
    assert "usage_context" in parameters(AsyncEngineArgs.create_engine_config)


def test_every_refused_flag_is_one_of_vllms_and_off_by_default() -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    defaults = vars(parser.parse_args([]))
    for option in _UNSUPPORTED:
        name = option.flag.removeprefix("--").replace("-", "_")
        assert name in defaults, option.flag
        assert defaults[name] in option.off, option.flag


def test_fp8_experts_are_refused_before_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags.current_platform, "device_type", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for backend in ("auto", "triton"):
        settings = ServeSettings(moe_backend=backend, expert_dtype="fp8_e4m3")
        with pytest.raises(ConfigError, match=f"--moe-backend is {backend} and the device is cpu"):
            flags.with_engine_values(argparse.Namespace(), settings, 4)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("triton", "cpu", "triton needs a CUDA device; .*; use --moe-backend reference"),
        ("cpu", "cuda", "cpu needs a CPU; the device is cuda; use --moe-backend reference"),
    ],
)
def test_a_backend_of_another_device_is_refused_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, message: str
) -> None:
    monkeypatch.setattr(flags.current_platform, "device_type", device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=message):
        flags.with_engine_values(argparse.Namespace(), ServeSettings(moe_backend=backend), 4)


def test_workers_read_what_the_front_end_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags.current_platform, "device_type", "cuda")
    args = argparse.Namespace(additional_config={"other": 1}, enforce_eager=False)
    settings = ServeSettings(expert_dtype="fp8_e4m3", max_pools=8, host_expert_bytes=1 << 30)
    filled = flags.with_engine_values(args, settings, 4)
    given = vllm_config(additional_config=filled.additional_config)
    assert has_front_end(given)
    expected = PluginSettings(4, 8, "auto", "fp8_e4m3", 1 << 30, records_routing=True)
    assert read_settings(given) == expected
    assert filled.additional_config["other"] == 1
    assert args.additional_config == {"other": 1}  # a namespace is never changed
    assert "kv_cache_memory_bytes" not in filled  # left to vLLM
    planned = flags.with_engine_values(args, settings, 4, 7)
    assert planned.kv_cache_memory_bytes == 7
    assert "hf_overrides" not in planned  # EMO has one model under one name
    args = argparse.Namespace(additional_config=None, hf_overrides={"rope_theta": 1.0})
    named = flags.with_engine_values(args, settings, 4, architecture="EmoServeX")
    assert named.hf_overrides == {"rope_theta": 1.0, "architectures": ["EmoServeX"]}
    assert args.hf_overrides == {"rope_theta": 1.0}


def test_pools_that_are_streamed_have_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags.current_platform, "device_type", "cpu")
    args = argparse.Namespace(additional_config=None, scheduler_cls=None)
    filled = flags.with_engine_values(args, ServeSettings(), 4, stream_slots=2)
    assert read_settings(vllm_config(additional_config=filled.additional_config)).stream_slots == 2
    assert resolve_obj_by_qualname(filled.scheduler_cls) is TurnScheduler
    assert flags.with_engine_values(args, ServeSettings(), 4).scheduler_cls is None
    own = argparse.Namespace(additional_config=None, scheduler_cls="own.Scheduler")
    filled = flags.with_engine_values(own, ServeSettings(), 4, stream_slots=2)
    assert filled.scheduler_cls == "own.Scheduler"


def test_our_flags_take_no_other_of_vllms_names() -> None:
    args = flags.parse_serve_args(["M", "--moe-backend", "reference", "--port", "81"], {"port": 99})
    assert (args.model_tag, args.port) == ("M", 81)
    assert (args.emo_moe_backend, args.moe_backend) == ("reference", "auto")
    vllm = {
        option
        for action in make_arg_parser(FlexibleArgumentParser())._actions
        for option in action.option_strings
    }
    ours = {"--pools", "--default-pool", "--expert-memory", "--expert-slots", "--preload"}
    assert not vllm & (ours | {"--max-pools", "--drain-timeout"})


def test_without_a_host_only_this_machine_can_connect() -> None:
    assert flags.parse_serve_args(["M"], {}).host == "127.0.0.1"
    assert flags.parse_serve_args(["M", "--host", "0.0.0.0"], {}).host == "0.0.0.0"


def test_the_model_may_be_given_as_a_flag() -> None:
    assert flags.parse_serve_args(["--model", "M"], {}).model_tag == "M"
    assert flags.parse_serve_args([], {}).model_tag is None


def test_without_a_model_some_defaults_are_others() -> None:
    others = {"kv_cache_memory_bytes": 7, "enforce_eager": True}
    with_model = flags.parse_serve_args(["M"], others)
    assert (with_model.kv_cache_memory_bytes, with_model.enforce_eager) == (None, False)
    without = flags.parse_serve_args([], others)
    assert (without.kv_cache_memory_bytes, without.enforce_eager) == (7, True)
    given = ["--kv-cache-memory-bytes", "1M", "--no-enforce-eager"]
    asked = flags.parse_serve_args(given, others)
    assert (asked.kv_cache_memory_bytes, asked.enforce_eager) == (2**20, False)


# -- spans --


def test_vllm_writes_one_span_per_request_by_that_name_and_with_its_callers_id() -> None:
    assert inspect.signature(RequestSpans.hold).parameters.keys() - {"self"} == set(
        inspect.signature(instrument_manual).parameters
    )
    text = source(OutputProcessor.do_tracing)
    assert "SpanAttributes.GEN_AI_REQUEST_ID: req_state.external_req_id" in text
    calls = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(text)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "instrument_manual"
    ]
    (call,) = calls
    assert {"span_name", "start_time", "attributes", "context", "kind"} == {
        keyword.arg for keyword in call.keywords
    }
