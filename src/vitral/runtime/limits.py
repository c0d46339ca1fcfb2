"""What the command line may be given, where the modules that know are slow to import.

Of numbers the smallest and the largest that can be meant; beyond them a zero too many was typed.
"""

SEED = (0, 2**32 - 1)  # what NumPy and scikit-learn take
PIXELS = (1, 8192)  # of an image's side
BATCH = (1, 2**20)
WORKERS = (0, 1024)
IMAGES = (1, 10**9)  # that a set is limited to
LABELS = (1, 10**6)  # to print of an image
ROUNDS = (1, 1000)
LAYER = (-1000, 999)
POINTS = (0.001, 100.0)  # of accuracy
MINUTES = (0.1, 1440.0)  # of a search
CLIENTS = (1, 1000)  # of a load test, at a time
LOAD_SECONDS = (0.1, 86_400)
RATE = (0, 100_000)  # requests a second; more than 0
REQUESTS = 10_000_000  # of a load test: their times are kept in memory

# What DATA may be.
DATA = (
    "an image folder, a table (.csv, .tsv, .jsonl, .parquet) or shards (.tar), or a pattern of those with "
    "{split}, hf://datasets/ORG/NAME, or 'digits'"
)
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")
TTA = ("none", "flip")
DECODINGS = ("full", "fast", "fastest")
SPLITS = ("train", "val", "test", "all")
FEATURES = ("class", "mean", "class_mean", "map")
FILLS = ("drop", "mean")
LOOKS = ("smooth", "patches", "both")
LAYOUTS = ("vitral", "timm", "transformers", "torchvision", "google")
FORMS = ("onnx", "onnx-image", "openvino", "pt2", "web")
OPSETS = (18, 23)  # of ONNX; `Resize` with antialias came with 18
DTYPES = ("float32", "float16", "bfloat16")
GOALS = ("latency", "throughput")
SCORING = ("local", "ray")  # what scores many images
RUN_ORDERS = ("score", "name", "date", "time")
ACTORS = (1, 100_000)
BENCHMARKS = ("train", "infer", "start", "data", "kernels")
# Files of what was wrong (`mistakes`).
LIST_SUFFIXES = (".csv", ".json")
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PAGE_SUFFIXES = (".html", ".htm")
CLEANED_SUFFIXES = (".csv", ".parquet")  # of data without what `check` found
