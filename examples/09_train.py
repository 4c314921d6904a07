"""A training script that ``09_scripts.py`` tunes, and that also runs by itself.

``python 09_train.py --width 32 --rate 0.01`` prints its accuracy after each epoch. Only its two
lines of JSON are there for the tuning.
"""

from __future__ import annotations

import argparse
import json

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier


parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--rate", type=float, default=0.01)
parser.add_argument("--epochs", type=int, default=8)
arguments = parser.parse_args()

x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(x / 16, y, random_state=0)
model = MLPClassifier((arguments.width,), learning_rate_init=arguments.rate, random_state=0)
accuracy = 0.0
for epoch in range(arguments.epochs):
    model.partial_fit(x_train, y_train, classes=range(10))
    accuracy = float(model.score(x_test, y_test))
    print(json.dumps({"step": epoch, "value": accuracy}))
print(json.dumps({"value": accuracy}))
