"""From any picture to a tensor.

`files` owns which files are pictures and what they may cost; `picture` what they are decoded to; `preprocess`
what a model takes of them; `augmentation` and `augment` what training alters. `sheet` and `notebook` draw
pictures for people.
"""
