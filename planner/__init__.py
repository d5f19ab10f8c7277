"""Facts in, plans out: the layout space, its price, its search, schedules, and the doors a Plan leaves through."""
