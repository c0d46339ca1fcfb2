"""timm's layout: `vision_transformer.py`, `deit.py`, `eva.py` and `beit.py`, hub folders and bare files."""
