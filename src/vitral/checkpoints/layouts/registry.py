"""The layouts of other libraries, asked in this order: the first that recognizes a file reads it."""

from vitral.checkpoints.layouts import authors, google, torchvision
from vitral.checkpoints.layouts.layout import Layout
from vitral.checkpoints.layouts.timm import read as read_timm
from vitral.checkpoints.layouts.timm import write as write_timm
from vitral.checkpoints.layouts.transformers import read as read_transformers
from vitral.checkpoints.layouts.transformers import write as write_transformers

LAYOUTS = (
    Layout("timm", read_timm.recognizes, read_timm.read, write_timm.write),
    Layout("transformers", read_transformers.recognizes, read_transformers.read, write_transformers.write),
    Layout("google", google.recognizes, google.read, google.write),
    Layout("torchvision", torchvision.recognizes, torchvision.read, torchvision.write),
    Layout("authors", authors.recognizes, authors.read),
)
# How a checkpoint becomes one of another library's, by its name.
WRITERS = {layout.name: layout.write for layout in LAYOUTS if layout.write is not None}
