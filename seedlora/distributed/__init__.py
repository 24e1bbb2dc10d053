"""How the processes of a run share its work: Lightning's strategies, clipping per replica, and a common end."""
