"use strict";
// Forms with a file: it goes up piece by piece, with its progress, and what is wrong is said beside the button. The form's token
// goes as a header, so that the server can ask for it before it reads the file.

(() => {
  for (const form of document.querySelectorAll("form[data-upload]")) {
    const bar = form.querySelector("progress");
    const wrong = form.querySelector("[role=alert]");
    const button = form.querySelector("button");
    const ended = (text) => {
      bar.hidden = true;
      button.disabled = false;
      wrong.hidden = false;
      wrong.textContent = text;
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const data = new FormData(form);
      const token = data.get("form_token");
      for (const [name, value] of [...data]) if (value === "" || name === "form_token") data.delete(name);
      const request = new XMLHttpRequest();
      request.open("POST", form.action);
      request.setRequestHeader("X-Form-Token", token);
      request.setRequestHeader("HX-Request", "true");
      request.responseType = "document";
      request.upload.addEventListener("progress", ({ loaded, total }) => { if (total) bar.value = loaded / total; });
      request.addEventListener("load", () => {
        const to = request.getResponseHeader("HX-Redirect");
        if (to) location.assign(to);
        else ended(request.response?.body.textContent.trim() || String(request.status));
      });
      request.addEventListener("error", () => ended(document.getElementById("toast").dataset.lost));
      wrong.hidden = true;
      bar.hidden = false;
      button.disabled = true;
      request.send(data);
    });
  }
})();
