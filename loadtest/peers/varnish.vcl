# Varnish as a peer of `loadtest bench`: its built-in rules, and passing on by path. @NAME@ is filled in when the peer starts.
# Its parameters are command line arguments: see launch.rs.
vcl 4.1;

backend origin {
    .host = "@HOST@";
    .port = "@PORT@";
}

sub vcl_recv {
    if (req.url ~ "^/pass/") {
        return (pass);
    }
}
