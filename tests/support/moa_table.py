"""A table like BBBC021's, so small that its scores are computed by hand: profiles are directions in a plane.

Week 1: a1 in two concentrations (MOA A), b1 and b2 (MOA B, in this week only); week 2: a2 (A) and t2 (T); taxol (T) in
weeks 1, 2 and 3; DMSO everywhere.
"""

import numpy as np
import torch

from dinov2.eval.feature_set import FeatureSet

# compound, concentration, MOA, week, direction in degrees
WELLS = (
    ("a1", 1, "A", 1, 0),
    ("a1", 10, "A", 1, 94),
    ("b1", 1, "B", 1, 90),
    ("b2", 1, "B", 1, 100),
    ("a2", 1, "A", 2, 20),
    ("t2", 1, "T", 2, 190),
    ("taxol", 1, "T", 1, 340),
    ("taxol", 1, "T", 2, 200),
    ("taxol", 1, "T", 3, 210),
    ("DMSO", 0, "DMSO", 1, 91),
    ("DMSO", 0, "DMSO", 2, 21),
    ("DMSO", 0, "DMSO", 3, 211),
)
SHIFTS = np.array([[0.1, 0.2], [-0.1, -0.2]])  # of the two images of a well


def moa_features(order=None, **columns):
    """Features [n, 2] of two plates a week, a well of each treatment on each, two images of each well.

    Args:
        order: rows in this order.
        columns: put in place of the columns of these names; None: taken away.
    """
    rows, values = [], []
    for plate in (1, 2):
        for number, (compound, concentration, moa, week, degrees) in enumerate(WELLS):
            direction = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
            for site, shift in enumerate(SHIFTS, start=1):
                name = f"Week{week}_{plate}"
                rows.append(
                    {
                        "path": f"{name}/{number:02d}_s{site}.tif",
                        "plate": name,
                        "well": f"B{number:02d}",
                        "batch": f"Week{week}",
                        "compound": compound,
                        "concentration": concentration,
                        "treatment": f"{compound} {concentration}",
                        "moa": moa,
                    }
                )
                values.append(direction + shift)
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]} | columns
    class_names = ("A", "B", "DMSO", "T")
    features = FeatureSet(
        name="CELLS",
        values=torch.tensor(np.array(values), dtype=torch.float64),
        targets=np.array([class_names.index(row["moa"]) for row in rows]),
        places=np.arange(len(rows)),
        class_names=class_names,
        columns={name: column for name, column in table.items() if column is not None},
    )
    return features if order is None else features.take(order)
