"""Share a run among processes: Lightning's strategies, clipping per replica, and a common end."""
