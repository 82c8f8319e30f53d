"""`serve`: from a checked config to an engine that answers until it is told to stop."""

from collections.abc import Callable
from pathlib import Path

from llmtrain.config.serve import ServeConfig
from llmtrain.config.serving import LitServeServing, VLLMServing
from llmtrain.files import write_whole
from llmtrain.journal import Journal
from llmtrain.serving.served import served_model, serving_directory
from llmtrain.serving.tracked import tracked


def serve(config: ServeConfig, say: Callable[[str], None]) -> int:
    """Serve the model that `config` names until SIGTERM or Ctrl-C; returns the exit code.

    Writes `outputs/serving/<name>-<key>/served.json` and a line of the journal. Raises UserError where the model, the
    form or the engine is not there, IntegrityError where files were changed.
    """
    served, directory = served_model(config)
    outputs = Path(config.outputs_dir)
    place = serving_directory(served, outputs)
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / "served.json", served.model_dump_json(indent=2) + "\n")
    Journal(outputs).append("model.served", label=served.label, form=served.form, sha256=served.sha256)
    form = f"trained weights in {served.precision}" if served.form == "trained" else served.form
    say(f"{served.label} as {served.name}: {form}, {served.context_tokens} tokens of context, by {config.serving.kind}")
    match config.serving:
        case LitServeServing() as litserve:
            from llmtrain.serving.litserve_server import serve_litserve

            with tracked(served, place, config.tracking, outputs, litserve.kind) as track:
                return serve_litserve(served, directory, litserve, config.infra, outputs, say, track)
        case VLLMServing() as vllm:
            from llmtrain.serving.vllm import serve_vllm

            with tracked(served, place, config.tracking, outputs, vllm.kind) as track:
                return serve_vllm(served, directory, vllm, config.infra, outputs, say, track)
