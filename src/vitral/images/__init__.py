"""From any picture to a tensor.

`files` owns which files are pictures and what they may cost; `picture` what they are decoded to; `preprocess`
what a model takes of them; `augment` what training alters. `sheet` draws pictures for people.
"""
