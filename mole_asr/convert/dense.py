"""The `convert dense` verb: slices back to dense feed-forward parts."""

from mole_asr.convert.host import open_host
from mole_asr.errors import MoleError
from mole_asr.files import check_output_folder


def dense(model: str, output: str) -> str:
    """Makes the slices of a converted model into dense feed-forward parts again: what all of them compute together.

    Of a model that `convert moefy` cut, that is the model it was made of, weight for weight; adapted to ReLU or tuned,
    if it was. A recogniser that was adapted to ReLU stays sliced: ours have no ReLU there. A Hugging Face model comes
    out as a folder that transformers reads.

    Args:
        model: folder of a model that `mole-asr convert` wrote.
        output: folder of the dense one.

    Returns:
        How many parts are dense now.

    Raises:
        MoleError: the model cannot be read, has no slices, or cannot be dense.
    """
    check_output_folder(output, model)
    host = open_host(model)
    layers = host.layers()
    if not layers:
        raise MoleError(f"{model}: has no slices; it is dense already")
    for name, layer in layers.items():
        host.put_dense(name, layer)
    host.save(output)
    return f"{output}: {len(layers)} feed-forward parts are dense again"
