"""`python -m train`, for recipes of the emoji family that set loss.classifier.

python -m train.emoji train/configs/emoji-m2.toml --set loss.classifier=models/emoji --set loss.perceptual=0.1
"""

from ..__main__ import main
from .features import ClassifierFeatures

if __name__ == "__main__":
    main(ClassifierFeatures)
