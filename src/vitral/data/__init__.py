"""Labelled images: source -> splits -> loader.

`sources` owns what a folder, a file or a Dataset means as data; `image_data` and `subsets` how it is divided;
`loader` the batches of a split; `randomness` every draw about images; `workers` the processes that load them;
`contents` whether a run's images are still the same.
"""
