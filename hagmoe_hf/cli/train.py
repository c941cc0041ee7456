"""`hagmoe train`: hands its words to the training room, whose options are the trainer's as well."""

import typer


def train(context: typer.Context) -> None:
    """Train a model: embeddings or masked language modelling, from options and a YAML file; --help lists all options."""
    try:
        from ..training.run import main
    except ModuleNotFoundError as error:
        raise ImportError(f"Training needs {error.name}: pip install hagmoe_hf[train]") from error
    try:
        main(context.args)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # what transformers says of report_to
            raise
        raise ImportError(str(error)) from error
