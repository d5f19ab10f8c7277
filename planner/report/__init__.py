"""Plans and schedules for people: tables on the terminal."""
