"""The course of training: which epochs are kept, and as what table."""

from robustify import course


def rows(stage, epochs):
    return [{"stage": stage, "epoch": epoch, "loss": epoch / 4} for epoch in range(epochs)]


def test_a_few_epochs_of_each_stage_with_the_first_and_the_last():
    kept = course.sampled([*rows("teacher", 101), *rows("student", 3)])
    assert [row["epoch"] for row in kept if row["stage"] == "teacher"] == [0, 20, 40, 60, 80, 100]
    assert [row["epoch"] for row in kept if row["stage"] == "student"] == [0, 1, 2]
    assert course.sampled(rows("only", 1)) == rows("only", 1)
    assert course.sampled([]) == []


def test_one_table_per_stage_with_gaps_where_a_term_was_not_logged():
    found = course.tables([*rows("teacher", 2), {"stage": "student", "epoch": 4, "loss": 1.0},
                           {"stage": "student", "epoch": 9, "loss": 0.5, "late": 2.0}])  # fmt: skip
    teacher, student = found
    assert teacher == {"stage": "teacher", "epochs": ["epoch 1", "epoch 2"],
                       "terms": [["loss", "0", "0.25"]]}  # fmt: skip
    assert student["epochs"] == ["epoch 5", "epoch 10"]
    assert student["terms"] == [["loss", "1", "0.5"], ["late", "", "2"]]
