"""`auglocal plan`"""

from .. import report
from ..planning.plan import plan
from .checks import check_cut, check_image_size
from .plan_stages import check_stages, stages_of
from .training_options import stepping_of

__all__ = ["plan_command"]


def plan_command(options):
    if options.front and options.budget is None:
        raise ValueError("--front draws the search under a budget: give --budget too, for instance --budget 6GB")
    check_stages(options)
    for path, option in ((options.picture, "--picture"), (options.front, "--front")):
        if path:
            report.check_picture(path, option)
    model, side = check_cut(options), options.image_size
    check_image_size(model, side, side, "--image-size")
    shape = (options.batch_size, 3, side, side)
    cutting = {name: getattr(options, name) for name in ("rule", "form", "auxiliary", "modules")}
    # Weights without values, as none is looked at; on the CPU, whose optimizer is planned.
    model = model.to_empty(device="cpu")
    planned = plan(
        model,
        shape,
        options.depth,
        precision=options.precision,
        memory_budget=options.budget,
        prefer=options.prefer,
        units=options.units,
        recompute=options.recompute,
        sync_batch_norm=options.sync_bn,
        **cutting,
        **stepping_of(options),
    )
    lines, picture = [], planned.save_picture
    if options.stages is not None:
        lines, picture = stages_of(planned, model, options)
    print(planned.brief() if options.brief else planned)
    if lines:
        print("", *lines, sep="\n")
    for path, save in ((options.picture, picture), (options.front, planned.save_front)):
        if path:
            save(path)
            print(f"saved {path}")
    return 0
