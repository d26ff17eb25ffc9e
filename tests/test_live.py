from __future__ import annotations

from conftest import small_profile

from kl3m_nb import live, run_folder, training


def test_the_button_asks_the_run_for_a_checkpoint(trained_run):
    button = live.save_button(trained_run[0])
    button.click()
    assert button.description.startswith("Asked for")
    assert run_folder.take_save_request(trained_run[0])


def test_a_run_that_goes_on_elsewhere_can_be_looked_at(tmp_path):
    pages = []

    def look(row):
        if row["kind"] == "train" and row["step"] in (3, 5):
            pages.append(live.show_run(tmp_path / "run").data)

    training.train(small_profile(), tmp_path / "run", callbacks=[look])
    assert len(pages) == 2 and all("data:image/png;base64," in page for page in pages) and pages[0] != pages[1]
