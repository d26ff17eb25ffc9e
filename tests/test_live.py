from __future__ import annotations

from kl3m_nb import live, run_folder


def test_the_button_asks_the_run_for_a_checkpoint(trained_run):
    button = live.save_button(trained_run[0])
    button.click()
    assert button.description.startswith("Asked for")
    assert run_folder.take_save_request(trained_run[0])
