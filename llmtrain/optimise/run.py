"""`optimise`: from a checked config to a form that is kept, or refused with its figures."""

from collections.abc import Callable
from pathlib import Path

from llmtrain.artifacts import OptimisedModel
from llmtrain.config.serve import OptimiseConfig
from llmtrain.journal import Journal
from llmtrain.optimise.optimise import optimise
from llmtrain.serving.served import source_of


def run(config: OptimiseConfig, say: Callable[[str], None]) -> OptimisedModel:
    """The form of the named model that `config` asks for, made where it is not there.

    Raises UserError where the model is not there, IntegrityError where its files were changed, NotBetter where the
    form is neither faster nor smaller here, or not good enough.
    """
    source, outputs = source_of(config), Path(config.outputs_dir)
    parents = (source.record.sha256,) if source.record else ()
    made = optimise(
        source.directory, source.weights_sha256, parents, outputs, config.optimise, say, threads=config.infra.threads
    )
    Journal(outputs).append("model.optimised", label=source.label, form=made.form, sha256=made.sha256)
    return made
