"""From any picture to a tensor: which files are pictures, preprocessing, augmentation."""
